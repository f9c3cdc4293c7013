"""Building blocks of the models: torch modules that call `venturi.kernels`. Layers know shapes, methods numerics."""
