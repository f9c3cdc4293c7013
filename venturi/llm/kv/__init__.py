"""The paged KV cache: who holds which block (pure Python), and the tensors behind the blocks."""
