"""Triton's Python models (`model.py`) in worker processes: the wire, the worker, and the module that models import."""
