"""L3: graph rewrites. pipeline.py is the one ordered list; every other file is one pass."""
