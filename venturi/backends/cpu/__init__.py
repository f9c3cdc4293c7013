"""The CPU backend: ATen and oneDNN calls with weights prepared once, timed against each other."""
