"""Which kernel computes a linear layer of a small decode batch: a Triton configuration or torch, by timing.

The choice depends on shape, neighbours, type and number of rows; it is kept in the user's cache, per device and
versions, so that a second start times nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from venturi.core.folders import cache_folder
from venturi.core.log import logger
from venturi.kernels.activations import gated as gated_product
from venturi.kernels.quantize import quantize_rows, scaled_product
from venturi.kernels.triton_kernels import small_linear as kernel_file
from venturi.kernels.triton_kernels.norms import rms_norm_fp8
from venturi.kernels.triton_kernels.small_linear import SmallLinearConfig, small_linear
from venturi.llm.fused_decode import KINDS
from venturi.llm.layers.attention import Attention
from venturi.llm.layers.feed_forward import GatedMlp
from venturi.llm.layers.linear import Linear
from venturi.llm.layers.norm import RmsNorm
from venturi.llm.models.decoder import Decoder, DecoderLayer

TILES = {2: [(64, 128, 6), (64, 256, 3), (128, 128, 3)], 1: [(64, 256, 4), (64, 128, 6), (128, 128, 4)]}
SPLITS = {2: (1, 2), 1: (1, 2, 4)}
TORCH = "torch"
Choice = SmallLinearConfig | str


@dataclass(frozen=True)
class Problem:
    """A kind of linear layer call; `rows` is a power of two from 16 on."""

    rows: int
    n: int
    k: int
    dtype: str
    norm: bool
    residual: bool
    activation: str | None

    @property
    def key(self) -> str:
        return " ".join(str(v) for v in asdict(self).values())


@dataclass(frozen=True)
class Use:
    """One layer with its neighbours."""

    layer: Linear
    norm: RmsNorm | None = None
    residual: bool = False
    activation: str | None = None


class LinearTuner:
    """Chooses and applies (it is a FusedLinear). Choices are read from and written to the user's cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tickets = torch.zeros(1 << 14, dtype=torch.int32, device=device)
        self._choices: dict[str, Choice] = {}
        self.times_us: dict[str, dict[str, float]] = {}
        self._path = _cache_path(device)
        if self._path.is_file():
            stored = json.loads(self._path.read_text())
            self._choices = {k: v if v == TORCH else SmallLinearConfig(**v) for k, v in stored.items()}

    def __call__(
        self, x: Tensor, layer: Linear, norm: RmsNorm | None, residual: Tensor | None, activation: str | None
    ) -> Tensor:
        use = Use(layer, norm, residual is not None, activation)
        return run(self._choices[problem(use, len(x)).key], x, use, residual, self.tickets)

    def tune(self, model: Decoder, rows: int) -> None:
        """Choose for every kind of layer that has no choice yet: 16 rows first, more rows from its winner."""
        if rows > 16:
            self.tune(model, 16)
        kinds: dict[Problem, list[Use]] = {}
        for use in uses(model):
            kinds.setdefault(problem(use, rows), []).append(use)
        fresh = [kind for kind in kinds if kind.key not in self._choices]
        for kind in fresh:
            smallest = self._choices.get(replace(kind, rows=16).key)
            choices = candidates(kind) if smallest is None else list({TORCH: 0, smallest: 0})
            times = {str(c): self._time_us(c, kinds[kind][:32], kind.rows) for c in choices}
            self.times_us[kind.key] = times
            best = min(choices, key=lambda c: times[str(c)])
            self._choices[kind.key] = best
            logger.info("linear %s: %s, %.1f us", kind.key, best, times[str(best)])
        if fresh:
            self._store()

    def _time_us(self, choice: Choice, same: list[Use], rows: int) -> float:
        """Median time of a call, in a graph over several layers: weights come from memory. inf if it fails."""
        weight, norm = same[0].layer.weight.dtype, same[0].norm
        dtype = weight if weight.itemsize > 1 else torch.bfloat16 if norm is None else norm.weight.dtype
        x = torch.randn(rows, same[0].layer.in_features, device=self._device, dtype=dtype)
        residual = None
        if same[0].residual:
            residual = torch.randn(rows, same[0].layer.out_features, device=self._device, dtype=dtype)
        try:
            return _graph_time_us(lambda: [run(choice, x, use, residual, self.tickets) for use in same], len(same))
        except Exception as exc:
            logger.warning("candidate %s fails: %s", choice, str(exc).splitlines()[0])
            self.tickets.zero_()
            return float("inf")

    def _store(self) -> None:
        fields = {k: v if isinstance(v, str) else asdict(v) for k, v in self._choices.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(fields, indent=1))
        temporary.replace(self._path)


def uses(model: Decoder) -> list[Use]:
    """Every linear call of a fused decode step."""
    found = []
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer), "a decoder's layers are DecoderLayers"
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention), "checked by fused_decode.refusal"
        assert isinstance(mlp, GatedMlp), "checked by fused_decode.refusal"
        assert isinstance(layer.input_layernorm, RmsNorm), "checked by fused_decode.refusal"
        assert isinstance(layer.post_attention_layernorm, RmsNorm), "checked by fused_decode.refusal"
        found += [
            Use(attention.qkv_proj, layer.input_layernorm),
            Use(attention.o_proj, residual=True),
            Use(mlp.gate_up_proj, layer.post_attention_layernorm, activation=KINDS[mlp.activation]),
            Use(mlp.down_proj, residual=True),
        ]
    assert isinstance(model.norm, RmsNorm), "checked by fused_decode.refusal"
    return [*found, Use(model.lm_head, model.norm)]


def problem(use: Use, rows: int) -> Problem:
    padded = max(16, 1 << (rows - 1).bit_length())
    weight = use.layer.weight
    kind = str(weight.dtype).removeprefix("torch.")
    return Problem(padded, weight.shape[0], weight.shape[1], kind, use.norm is not None, use.residual, use.activation)


def candidates(kind: Problem) -> list[Choice]:
    """torch, and the tiles whose programs give every multiprocessor something to do."""
    outputs = kind.n // 2 if kind.activation else kind.n
    found: list[Choice] = [TORCH]
    width = 1 if "float8" in kind.dtype else 2
    for (block_n, block_k, stages), splits in product(TILES[width], SPLITS[width]):
        programs = -(-outputs // block_n) * splits
        if splits == 1 or programs <= 512:
            found.append(SmallLinearConfig(block_n, block_k, stages, 4, splits))
    return found


def run(choice: Choice, x: Tensor, use: Use, residual: Tensor | None, tickets: Tensor) -> Tensor:
    """Apply a layer with its neighbours the chosen way."""
    layer, norm, kind = use.layer, use.norm, x.dtype
    x_scales = None
    if layer.weight.dtype == torch.float8_e4m3fn:
        if norm is None:
            x, x_scales = quantize_rows(x)
        else:
            x, x_scales, _ = rms_norm_fp8(x, norm.weight, norm.eps, None, norm.offset)
    elif norm is not None:
        x = norm(x)[0]
    if isinstance(choice, SmallLinearConfig):
        return small_linear(
            x, layer.weight, choice, tickets=tickets, x_scales=x_scales, scales=layer.scales, residual=residual,
            bias=layer.bias, gated=use.activation, out_dtype=kind,
        )  # fmt: skip
    if x_scales is None or layer.scales is None:
        y = F.linear(x, layer.weight, layer.bias)
    else:
        y = scaled_product(x, x_scales, layer.weight, layer.scales, layer.bias, kind)
    if use.activation is not None:
        y = gated_product(y, "silu" if use.activation == "silu" else "gelu_pytorch_tanh")
    return y if residual is None else y + residual


def _graph_time_us(work: Callable[[], Any], calls: int) -> float:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(7):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return float(sorted(times)[len(times) // 2])


def _cache_path(device: torch.device) -> Path:
    import triton

    source = inspect.getsource(kernel_file) + repr((TILES, SPLITS))
    parts = [torch.cuda.get_device_name(device), torch.__version__, triton.__version__, source]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "llm" / f"linear-{digest}.json"
