"""Batch invariance on the CPU: what a token becomes does not depend on what else is in the step, bit for bit.

torch picks the order of a product's sums by its shape, and computes a function by vector or by scalar code depending
on where in the whole tensor an element lies. So products take a fixed number of rows at a time (generated ones sum in
one order for any number), functions one row, and attention without generated code one token. Norms and softmax work
row by row as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from venturi.core.errors import RequestError
from venturi.kernels.attention import AttentionBatch
from venturi.kernels.quantize import ScaledRows
from venturi.llm.cpu_code import serves_attention
from venturi.llm.cpu_linear import GeneratedMethod
from venturi.llm.kv.pool import KvPool
from venturi.llm.layers.attention import Attention, LayerCache
from venturi.llm.layers.feed_forward import GatedMlp, MixtureOfExperts, PlainMlp
from venturi.llm.layers.linear import Linear, LinearMethod
from venturi.llm.models.decoder import Decoder, DecoderLayer

ROWS = 16


def check_device(device: torch.device) -> None:
    """Raises RequestError where there is no batch invariance."""
    if device.type != "cpu":
        raise RequestError(f"deterministic=True on {device}; batch invariance is there on the CPU only")


def make_invariant(model: Decoder, pool: KvPool) -> None:
    """Change a loaded model in place. Its runner draws tokens row by row and gives all attention to generated code."""
    dtype = model.embed_tokens.weight.dtype
    for module in model.modules():
        if isinstance(module, Linear) and not isinstance(module.method, GeneratedMethod):
            module.method = FixedRows(module.method, module)
    for layer, cache in zip(model.layers, pool.layers):
        assert isinstance(layer, DecoderLayer), "a decoder's layers are DecoderLayers"
        attention, mlp = layer.self_attn, layer.mlp
        if not (isinstance(attention, Attention) and serves_attention(attention.spec, dtype, cache.k)):
            layer.add_module("self_attn", ByToken(attention))
        if isinstance(mlp, MixtureOfExperts):
            layer.add_module("mlp", ByRow(mlp))
        elif isinstance(mlp, GatedMlp | PlainMlp):
            mlp.act = by_row(mlp.act)
    if model.spec.logit_softcap is not None:
        model.cap = by_row(model.cap)  # type: ignore[assignment,method-assign]


def by_row(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of every row by itself, so that each is computed as if it were alone."""
    return lambda x: torch.cat([function(row) for row in x.split(1)]) if len(x) > 1 else function(x)


class FixedRows:
    """A LinearMethod that always multiplies the same number of rows: zeros fill up the last. One row at a time where
    this library's results depend on a row's place among the others, which is tried out."""

    takes_fp8 = False

    def __init__(self, inner: LinearMethod, layer: Linear) -> None:
        self._inner = inner
        self._rows = ROWS if self._ignores_place(layer) else 1
        self.name = f"{inner.name}, {self._rows} rows at a time"

    def prepare(self, layer: Linear) -> None:
        self._inner.prepare(layer)

    def apply(self, layer: Linear, x: Tensor | ScaledRows) -> Tensor:
        assert isinstance(x, Tensor), "only given to methods that take it"
        parts = [self._inner.apply(layer, _filled(part, self._rows))[: len(part)] for part in x.split(self._rows)]
        return torch.cat(parts)

    def _ignores_place(self, layer: Linear) -> bool:
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(1, layer.in_features, generator=generator).to(_activations(layer))
        filled = self._inner.apply(layer, row.expand(ROWS, -1).contiguous())
        alone = self._inner.apply(layer, _filled(row, ROWS))[:1]
        return bool((filled == alone).all())


def _activations(layer: Linear) -> torch.dtype:
    """What the layer multiplies."""
    if layer.weight.dtype == torch.float8_e4m3fn:
        return torch.bfloat16
    return layer.weight.dtype


def _filled(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


class ByRow(nn.Module):
    """A feed-forward layer of each row by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(row) for row in x.split(1)])


class ByToken(nn.Module):
    """An attention layer of each token by itself, in their order: every one finds those before it in the cache."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, angles: Tensor | None, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        return torch.cat([self.inner(x[i : i + 1], angles, cache, one) for i, one in enumerate(tokens_of(batch))])


def tokens_of(batch: AttentionBatch) -> list[AttentionBatch]:
    """A batch for every token, which sees itself and what comes before it."""
    starts, _ = batch.host
    found = []
    for row, first, end in zip(batch.table_rows, starts, starts[1:]):
        for i in range(first, end):
            keys = int(batch.positions[i]) + 1
            found.append(replace(
                batch, query_starts=torch.tensor([0, 1], dtype=torch.int32), table_rows=row[None],
                seq_lens=torch.tensor([keys], dtype=torch.int32), positions=batch.positions[i : i + 1],
                slots=batch.slots[i : i + 1], max_query=1, max_keys=keys, num_decodes=1, host=([0, 1], [keys]),
                workspace={}, generated=None,
            ))  # fmt: skip
    return found
