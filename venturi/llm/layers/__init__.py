"""Building blocks of the models: torch modules that call `venturi.kernels`. A layer knows shapes, its method the numerics."""
