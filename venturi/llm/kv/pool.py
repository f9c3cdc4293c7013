"""The tensors behind the cache blocks, and the block moves that the accounting asks for."""

from __future__ import annotations

import torch

from venturi.core.errors import RequestError
from venturi.llm.kv.cache import Moves
from venturi.llm.layers.attention import LayerCache
from venturi.llm.models.spec import AttentionSpec, DecoderSpec

CACHE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
SCALE_BYTES = 4


def block_bytes(spec: DecoderSpec, block_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, scales of int8 included."""
    scales = 2 * SCALE_BYTES if dtype == torch.int8 else 0
    per_token = sum(
        layer.attention.cache_heads
        * ((layer.attention.cache_k_dim + layer.attention.cache_v_dim) * dtype.itemsize + scales)
        for layer in spec.layers
    )
    return per_token * block_tokens


def check_dtype(spec: DecoderSpec, dtype: torch.dtype) -> None:
    """Raises RequestError where the model's cache cannot be of this type."""
    if dtype == torch.int8 and any(layer.attention.mla for layer in spec.layers):
        raise RequestError(
            'kv_cache dtype="int8": the latents of this model\'s attention (MLA) are keys and values at once, and'
            ' their rotated part needs another scale; use dtype="fp8" or "auto"'
        )


class KvPool:
    """One k and one v tensor a layer, [num_blocks + 1, block_tokens, heads, dim]; the last block is for padding."""

    def __init__(
        self, spec: DecoderSpec, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device,
        host_blocks: int = 0,
    ) -> None:  # fmt: skip
        self.num_blocks, self.block_tokens, self.dtype, self.device = num_blocks, block_tokens, dtype, device
        pinned = device.type == "cuda"
        self.layers = [_layer(layer.attention, num_blocks + 1, block_tokens, dtype, device) for layer in spec.layers]
        self.host = [
            _layer(layer.attention, host_blocks, block_tokens, dtype, torch.device("cpu"), pinned)
            for layer in spec.layers
            if host_blocks
        ]

    def close(self) -> None:
        """Free the tensors."""
        self.layers.clear()
        self.host.clear()

    def apply(self, moves: Moves) -> None:
        """Carry out block moves in their order (see `Moves`). Asynchronous on CUDA, in stream order."""
        if moves.swap_out:
            self._move(self.layers, self.host, moves.swap_out)
        if moves.copy:
            self._move(self.layers, self.layers, moves.copy)
        if moves.swap_in:
            self._move(self.host, self.layers, moves.swap_in)

    def _move(self, source: list[LayerCache], target: list[LayerCache], pairs: list[tuple[int, int]]) -> None:
        for read, write in zip(source, target):
            from_, to = read.k.device, write.k.device
            reads = torch.tensor([a for a, _ in pairs], device=from_)
            writes = torch.tensor([b for _, b in pairs], device=to)
            for a, b in zip((read.k, read.v, *(read.scales or ())), (write.k, write.v, *(write.scales or ()))):
                if b.data_ptr() == write.k.data_ptr() and b is not write.k:
                    continue
                as_bytes, into = a.view(torch.uint8), b.view(torch.uint8)
                into[writes] = as_bytes[reads].to(to)


def _layer(
    spec: AttentionSpec, blocks: int, tokens: int, dtype: torch.dtype, device: torch.device, pinned: bool = False
) -> LayerCache:
    def empty(dim: int) -> torch.Tensor:
        return torch.zeros(blocks, tokens, spec.cache_heads, dim, dtype=dtype, device=device, pin_memory=pinned)

    def scale() -> torch.Tensor:
        return torch.zeros(blocks, tokens, spec.cache_heads, dtype=torch.float32, device=device, pin_memory=pinned)

    k = empty(spec.cache_k_dim)
    if spec.cache_v_dim:
        return LayerCache(k, empty(spec.cache_v_dim), (scale(), scale()) if dtype == torch.int8 else None)
    assert spec.mla is not None, "only MLA keeps its values in the keys"
    return LayerCache(k, k[..., : spec.mla.kv_rank])
