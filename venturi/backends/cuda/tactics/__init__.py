"""Ways to compute Regions on an NVIDIA GPU."""
