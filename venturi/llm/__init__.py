"""Large language models: text in, text out, many requests at once. `api.py` is the way in.

models/ are torch modules made of layers/; kv/ owns cache blocks; scheduler/ picks what each step computes;
runner.py computes it; loop.py turns steps into answers. Nothing here knows the network.
"""
