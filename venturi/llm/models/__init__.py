"""Architectures: one short file each turns a Hugging Face config into a DecoderSpec and names checkpoint tensors.

To add one: write a file like `llama.py` and list it in `registry.py`.
"""
