"""Decode steps as CUDA graphs, one per batch size, captured when first needed.

A batch runs in the next larger captured size; its padding rows write to the cache's spare block and to the spare slot.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from venturi.core.log import logger
from venturi.kernels.attention import AttentionBatch
from venturi.kernels.triton_kernels.argmax import ArgmaxState, Memory, argmax
from venturi.kernels.triton_kernels.step_start import step_start
from venturi.llm.config import CudaGraphConfig
from venturi.llm.fused_decode import MAX_ROWS, FusedDecode, refusal
from venturi.llm.kv.pool import KvPool
from venturi.llm.layers.feed_forward import Experts
from venturi.llm.linear_tuner import LinearTuner
from venturi.llm.models.decoder import Decoder
from venturi.llm.step_inputs import StepInputs
from venturi.llm.step_ring import StepRing

TYPICAL_KEYS = 1024


@dataclass
class Captured:
    """ring: what the graph reads. logits, tokens: its results. compute holds what it works on."""

    graph: torch.cuda.CUDAGraph
    ring: StepRing
    logits: Tensor
    tokens: Tensor
    compute: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Replayed:
    """logits: [rows, vocab]; tokens: [rows] greedy ones; both are overwritten by the next run. on_host: the same tokens
    in pinned memory, there when the stream gets to what follows, for seven more runs of the size."""

    logits: Tensor
    tokens: Tensor
    on_host: Tensor


class DecodeGraphs:
    """Captures and replays decode steps. Used by one thread, on one stream."""

    def __init__(
        self, model: Decoder, pool: KvPool, tables: Tensor, last_tokens: Tensor, config: CudaGraphConfig,
        max_slots: int, max_seq_len: int, shipped: Path | None = None,
    ) -> None:  # fmt: skip
        self._model, self._pool, self._tables, self._last_tokens = model, pool, tables, last_tokens
        self._spare_slot, self._max_seq_len = max_slots, max_seq_len
        self._sizes = [n for n in config.sizes() if n <= max_slots] if config.enabled else []
        self._off = "CUDA graphs are off"
        if any(isinstance(m, Experts) and not m.gate.on_device for m in model.modules()):
            self._sizes, self._off = [], "experts of this activation are picked on the host, which a graph cannot"
        self._padding = config.enable_padding
        self._captured: dict[int, Captured] = {}
        self._memory: Any = None
        self._tuner = LinearTuner(pool.device, shipped)
        self._argmax = ArgmaxState.make(max([1, *self._sizes]), pool.device)
        self._refusal = refusal(model)
        self._weight = model.embed_tokens.weight
        self._scale = float(torch.tensor(model.spec.embedding_scale, dtype=self._weight.dtype))

    @property
    def choices(self) -> Path:
        """The user's file of chosen kernels; there may be none yet."""
        return self._tuner.path

    def covers(self, rows: int) -> bool:
        """Whether a decode step of that many sequences runs as a graph."""
        return self._size(rows) is not None

    def run(self, inputs: StepInputs) -> Replayed:
        """Replay the step. The graph itself keeps its greedy tokens as the newest of their sequences."""
        rows = len(inputs.tokens)
        size = self._size(rows)
        assert size is not None, "run is called for covered sizes only"
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        captured = self._captured[size]
        fields = (inputs.tokens, inputs.owners, inputs.positions, inputs.slots, inputs.seq_lens)
        entry = captured.ring.fill(fields, self._spare_row)
        captured.graph.replay()
        captured.ring.replayed(entry)
        return Replayed(captured.logits[:rows], captured.tokens[:rows], captured.ring.tokens[entry, :rows])

    def capture_all(self) -> None:
        """Capture every size now, the largest first, so that all share its memory."""
        for size in reversed(self._sizes):
            if size not in self._captured:
                self._captured[size] = self._capture(size)

    def clear(self) -> None:
        """Free the captured graphs."""
        self._captured.clear()

    def describe(self) -> str:
        if not self._sizes:
            return f"launched one by one ({self._off})"
        how = f"fused small-batch linears up to {MAX_ROWS} rows, modules above"
        if self._refusal:
            how = f"modules ({self._refusal})"
        return (
            f"CUDA graphs of {self._sizes[0]}..{self._sizes[-1]} sequences, {how}; captured: {sorted(self._captured)}"
        )

    def _size(self, rows: int) -> int | None:
        place = bisect_left(self._sizes, rows)
        if place == len(self._sizes) or (not self._padding and self._sizes[place] != rows):
            return None
        return self._sizes[place]

    @property
    def _spare_row(self) -> tuple[int, ...]:
        return 0, self._spare_slot, 0, self._pool.num_blocks * self._pool.block_tokens, 1

    def _capture(self, size: int) -> Captured:
        ring = StepRing(size, self._pool.device)
        ring.fill([np.zeros(0, dtype=np.int64)] * 5, self._spare_row)
        compute = self._computation(ring, size)
        compute()
        ring.rewind()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        gc.collect()
        gc.disable()  # freeing device objects while a stream records ends the recording
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                logits, tokens = compute()
        finally:
            gc.enable()
        self._memory = graph.pool()
        logger.info("captured a decode graph of %d sequences", size)
        return Captured(graph, ring, logits, tokens, compute)

    def _trial(self, rows: int) -> Callable[[], Tensor]:
        """A fused step over whatever the cache holds, to be timed; it writes to the spare block only."""

        def filled(value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=self._pool.device)

        lengths = filled(min(self._max_seq_len, TYPICAL_KEYS), torch.int32)
        batch = AttentionBatch(
            torch.arange(rows + 1, dtype=torch.int32, device=lengths.device), lengths, self._tables,
            filled(self._spare_slot, torch.int32), filled(0, torch.int64),
            filled(self._pool.num_blocks * self._pool.block_tokens, torch.int64), 1, self._max_seq_len,
            workspace={"tickets": torch.zeros(rows * 256, dtype=torch.int32, device=lengths.device)},
        )  # fmt: skip
        start = self._weight[filled(0, torch.int64)]  # numbers as a step's: zeros would let the device run faster
        return lambda: FusedDecode(self._model, self._tuner).logits(start, batch, self._pool.layers)

    def _computation(self, ring: StepRing, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """What one step of `size` rows computes: a function of the ring's contents, to be captured."""
        fused = self._refusal is None and size <= MAX_ROWS
        if fused:
            self._tuner.tune(self._model, size, self._trial)
        device, numbers = self._pool.device, ring.numbers
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        batch = AttentionBatch(
            starts, numbers.lengths, self._tables, numbers.owners, numbers.positions, numbers.slots, 1,
            self._max_seq_len, workspace={"tickets": torch.zeros(size * 256, dtype=torch.int32, device=device)},
        )  # fmt: skip
        memory = Memory(self._last_tokens, numbers.owners, ring.tokens, numbers.entry)

        def compute() -> tuple[Tensor, Tensor]:
            stream = step_start(ring.inputs, numbers, self._last_tokens, self._weight, self._scale)
            if fused:
                logits = FusedDecode(self._model, self._tuner).logits(stream, batch, self._pool.layers)
            else:
                logits = self._model.raw_logits(self._model.from_embeddings(stream, batch, self._pool.layers))
            return logits, argmax(logits, self._argmax, memory)

        return compute
