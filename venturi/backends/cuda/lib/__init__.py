"""NVIDIA's libraries behind small interfaces."""
