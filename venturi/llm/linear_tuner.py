"""Which kernel computes a linear layer of a small decode batch: a Triton or Gluon configuration, or torch, by timing.

Kinds of layers are first timed each by itself, then the best few of each in their place, in a whole decode step:
there a kernel may fetch its weights while the one in front ends. Choices depend on shape, neighbours, type and number
of rows; they are kept in the user's cache, per device and versions, so that a second start times nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from venturi.core.folders import cache_folder
from venturi.core.log import logger
from venturi.kernels.triton_kernels import small_linear, stream_linear
from venturi.kernels.triton_kernels.launch import num_sms
from venturi.kernels.triton_kernels.small_linear import SmallLinearConfig
from venturi.kernels.triton_kernels.stream_linear import StreamLinearConfig
from venturi.llm.fused_linear import TORCH, Choice, Problem, Use, problem, run, uses
from venturi.llm.layers.linear import Linear
from venturi.llm.layers.norm import RmsNorm
from venturi.llm.models.decoder import Decoder

TILES = {2: [(64, 128, 6), (64, 256, 3), (128, 128, 3)], 1: [(64, 256, 4), (64, 128, 6), (128, 128, 4)]}
SPLITS = {2: (1, 2), 1: (1, 2, 4)}
# Programs a multiprocessor -> steps of 8 KiB in flight in each.
DEPTHS = {1: 12, 2: 8, 3: 6}
AHEAD = (0, 8)
FINALISTS = 8
PASSES = 2
SAMPLE = 24  # layers of a kind that are timed together
FEW_ROWS = 8
_KINDS: dict[str, type[SmallLinearConfig] | type[StreamLinearConfig]] = {
    "small": SmallLinearConfig,
    "stream": StreamLinearConfig,
}


class LinearTuner:
    """Chooses and applies (it is a FusedLinear). Choices are read from and written to the user's cache.

    `shipped`: a folder with choices that came with a model; the user's own go before them.
    """

    def __init__(self, device: torch.device, shipped: Path | None = None) -> None:
        self._device = device
        self.tickets = torch.zeros(1 << 14, dtype=torch.int32, device=device)
        self._choices: dict[str, Choice] = {}
        self._finalists: dict[str, list[Choice]] = {}
        self.times_us: dict[str, dict[str, float]] = {}
        self.path = _cache_path(device)
        self._choices = read_choices(*([shipped / self.path.name] if shipped else []), self.path)

    def __call__(
        self, x: Tensor, layer: Linear, norm: RmsNorm | None, residual: Tensor | None, activation: str | None
    ) -> Tensor:
        use = Use(layer, norm, residual is not None, activation)
        return run(self._choices[problem(use, len(x)).key], x, use, residual, self.tickets)

    def tune(self, model: Decoder, rows: int, step: Callable[[int], Callable[[], Any]]) -> None:
        """Choose for every kind of layer that has no choice yet: 8 rows first, more rows from its best few.

        Args:
            step: for a number of rows, a whole decode step that applies its layers through this object.
        """
        if rows > FEW_ROWS:
            self.tune(model, FEW_ROWS, step)
        kinds: dict[Problem, list[Use]] = {}
        for use in uses(model):
            kinds.setdefault(problem(use, rows), []).append(use)
        fresh = [kind for kind in kinds if kind.key not in self._choices]
        for kind in fresh:
            choices = self._worth_timing(kind)
            times = {str(c): self._time_us(c, kinds[kind][:SAMPLE], kind.rows) for c in choices}
            self.times_us[kind.key] = times
            working = [c for c in choices if times[str(c)] < float("inf")]
            self._finalists[kind.key] = sorted(working, key=lambda c: times[str(c)])[:FINALISTS]
            self._choices[kind.key] = self._finalists[kind.key][0]
        if fresh:
            self._choose_in_place(fresh, step(rows))
            self._store()

    def _worth_timing(self, kind: Problem) -> list[Choice]:
        smaller = self._finalists.get(replace(kind, rows=FEW_ROWS).key)
        if kind.rows > FEW_ROWS and smaller:
            return list(dict.fromkeys((TORCH, *smaller)))
        return candidates(kind, self._device)

    def _choose_in_place(self, fresh: Sequence[Problem], step: Callable[[], Any]) -> None:
        best = _graph_time_us(step, 1)
        for kind in [*fresh] * PASSES:
            for choice in self._finalists[kind.key]:
                before = self._choices[kind.key]
                if choice == before:
                    continue
                self._choices[kind.key] = choice
                time = _graph_time_us(step, 1)
                if time < best:
                    best = time
                else:
                    self._choices[kind.key] = before
            logger.info("linear %s: %s", kind.key, self._choices[kind.key])

    def _inputs(self, use: Use, rows: int) -> tuple[Tensor, Tensor | None]:
        weight, norm = use.layer.weight.dtype, use.norm
        dtype = weight if weight.itemsize > 1 else torch.bfloat16 if norm is None else norm.weight.dtype
        x = torch.randn(rows, use.layer.in_features, device=self._device, dtype=dtype)
        if not use.residual:
            return x, None
        return x, torch.randn(rows, use.layer.out_features, device=self._device, dtype=dtype)

    def _time_us(self, choice: Choice, same: list[Use], rows: int) -> float:
        """Median time of a call, in a graph over several layers: weights come from memory. inf if it fails."""
        x, residual = self._inputs(same[0], rows)
        try:
            return _graph_time_us(lambda: [run(choice, x, use, residual, self.tickets) for use in same], len(same))
        except Exception as exc:
            logger.warning("candidate %s fails: %s", choice, str(exc).splitlines()[0])
            self.tickets.zero_()
            return float("inf")

    def _store(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({k: _encoded(v) for k, v in self._choices.items()}, indent=1))
        temporary.replace(self.path)


def candidates(kind: Problem, device: torch.device) -> list[Choice]:
    """torch, and the tiles whose programs give every multiprocessor something to do."""
    outputs = kind.n // 2 if kind.activation else kind.n
    found: list[Choice] = [TORCH]
    width = 1 if "float8" in kind.dtype else 2
    for (block_n, block_k, stages), splits in product(TILES[width], SPLITS[width]):
        programs = -(-outputs // block_n) * splits
        if splits == 1 or programs <= 512:
            found.append(SmallLinearConfig(block_n, block_k, stages, 4, splits))
    if torch.cuda.get_device_capability(device)[0] == 9 and kind.k * width % 16 == 0:
        streams = stream_candidates(outputs, kind.activation is not None, num_sms(device.index or 0))
        prepared = width == 1 or kind.norm
        found += [replace(c, inside=True) for c in streams if prepared] if kind.rows == 1 else []
        found += streams
    return found


def stream_candidates(outputs: int, gated: bool, sms: int) -> list[StreamLinearConfig]:
    """Up to three programs a multiprocessor, whose rings together hold about 100 KiB.

    >>> [(c.splits, c.depth) for c in stream_candidates(4096, False, 132) if not c.ahead]
    [(2, 12), (3, 8), (4, 8), (6, 6)]
    """
    tiles = -(-outputs // 64)
    found = []
    for splits in (1, 2, 3, 4, 6):
        each = -(-tiles * splits // sms)
        if (each > 3 and splits > 1) or 2 * tiles * splits < sms:
            continue
        depth = DEPTHS[min(each, 3)]
        for deep in {depth // 2, 3 * depth // 4} if gated else {depth}:
            found += [StreamLinearConfig(64, deep, splits, ahead) for ahead in AHEAD]
    return sorted(found, key=lambda c: (c.splits, c.depth, c.ahead))


def read_choices(*paths: Path) -> dict[str, Choice]:
    """Of the files that are there; later ones go before earlier ones. What cannot be read counts as not there."""
    found: dict[str, Choice] = {}
    for path in paths:
        if path.is_file():
            try:
                found |= {k: _decoded(v) for k, v in json.loads(path.read_text()).items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
                logger.warning("choices of kernels in %s are not read: %s", path, exc)
    return found


def _encoded(choice: Choice) -> Any:
    if isinstance(choice, str):
        return choice
    return {name: asdict(choice) for name, kind in _KINDS.items() if isinstance(choice, kind)}


def _decoded(stored: Any) -> Choice:
    if stored == TORCH:
        return TORCH
    ((name, fields),) = stored.items()
    return _KINDS[name](**fields)


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

    source = "".join(map(inspect.getsource, (small_linear, stream_linear))) + Path(__file__).read_text()
    parts = [torch.cuda.get_device_name(device), torch.__version__, triton.__version__, source]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "llm" / f"linear-{digest}.json"
