"""Decode steps as CUDA graphs, one per batch size, captured when first needed.

A batch runs in the next larger captured size; its padding rows write to the cache's spare block and to the spare slot.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from venturi.core.log import logger
from venturi.kernels.attention import AttentionBatch
from venturi.kernels.triton_kernels.argmax import ArgmaxState, argmax
from venturi.llm.config import CudaGraphConfig
from venturi.llm.fused_decode import MAX_ROWS, FusedDecode, refusal
from venturi.llm.kv.pool import KvPool
from venturi.llm.linear_tuner import LinearTuner
from venturi.llm.models.decoder import Decoder
from venturi.llm.models.spec import MoeSpec
from venturi.llm.staging import Staging
from venturi.llm.step_inputs import Ints, StepInputs

TYPICAL_KEYS = 1024
FIELDS = 5  # tokens, owners, positions, slots, seq_lens


@dataclass
class Captured:
    """inputs: [FIELDS * size] int64, read by the graph. logits, tokens: its results. compute holds what it reads."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor
    tokens: Tensor
    compute: Callable[[], tuple[Tensor, Tensor]]


class DecodeGraphs:
    """Captures and replays decode steps. Used by one thread, on one stream."""

    def __init__(
        self, model: Decoder, pool: KvPool, tables: Tensor, last_tokens: Tensor, config: CudaGraphConfig,
        max_slots: int, max_seq_len: int,
    ) -> None:  # fmt: skip
        self._model, self._pool, self._tables, self._last_tokens = model, pool, tables, last_tokens
        self._spare_slot, self._max_seq_len = max_slots, max_seq_len
        self._sizes = [n for n in config.sizes() if n <= max_slots] if config.enabled else []
        self._off = "CUDA graphs are off"
        if any(isinstance(layer.mlp, MoeSpec) for layer in model.spec.layers):
            self._sizes, self._off = [], "experts are picked on the host, which a graph cannot"
        self._padding = config.enable_padding
        self._captured: dict[int, Captured] = {}
        self._memory: Any = None
        self._newest: Tensor | None = None
        self._tuner = LinearTuner(pool.device)
        self._argmax = ArgmaxState.make(max([1, *self._sizes]), pool.device)
        self._refusal = refusal(model)

    def covers(self, rows: int) -> bool:
        """Whether a decode step of that many sequences runs as a graph."""
        return self._size(rows) is not None

    def run(self, inputs: StepInputs, staging: Staging) -> tuple[Tensor, Tensor]:
        """Replay: (logits [rows, vocab], greedy tokens [rows]); both are overwritten by the next run."""
        rows = len(inputs.tokens)
        size = self._size(rows)
        assert size is not None, "run is called for covered sizes only"
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        captured = self._captured[size]
        staging.upload(*self._padded(inputs, size), into=captured.inputs)
        captured.graph.replay()
        self._newest = captured.tokens
        return captured.logits[:rows], captured.tokens[:rows]

    def remembered(self, tokens: Tensor) -> bool:
        """Whether the graph itself has stored these tokens in the token pool (they are its greedy tokens)."""
        return self._newest is not None and tokens.data_ptr() == self._newest.data_ptr()

    def capture_all(self) -> None:
        """Capture every size now, the largest first, so that all share its memory."""
        for size in reversed(self._sizes):
            if size not in self._captured:
                self._captured[size] = self._capture(size)

    def clear(self) -> None:
        """Free the captured graphs."""
        self._captured.clear()
        self._newest = None

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

    def _padded(self, inputs: StepInputs, size: int) -> list[Ints]:
        spare = size - len(inputs.tokens)
        padding = (0, self._spare_slot, 0, self._pool.num_blocks * self._pool.block_tokens, 1)
        fields = (inputs.tokens, inputs.owners, inputs.positions, inputs.slots, inputs.seq_lens)
        if not spare:
            return list(fields)
        return [np.concatenate((field, np.full(spare, fill))) for field, fill in zip(fields, padding)]

    def _capture(self, size: int) -> Captured:
        inputs = torch.zeros(FIELDS * size, dtype=torch.int64, device=self._pool.device)
        view = inputs.view(FIELDS, size)
        for row, fill in zip(view, (0, self._spare_slot, 0, self._pool.num_blocks * self._pool.block_tokens, 1)):
            row.fill_(fill)
        compute = self._computation(view)
        compute()
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
        return Captured(graph, inputs, logits, tokens, compute)

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
        tokens = filled(0, torch.int64)
        return lambda: FusedDecode(self._model, self._tuner).logits(tokens, batch, self._pool.layers)

    def _computation(self, view: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """What one step of view's rows computes: a function of the views' contents, to be captured."""
        tokens, owners, positions, slots, lengths = view
        size = len(tokens)
        fused = self._refusal is None and size <= MAX_ROWS
        if fused:
            self._tuner.tune(self._model, size, self._trial)
        workspace = {"tickets": torch.zeros(size * 256, dtype=torch.int32, device=view.device)}
        starts = torch.arange(size + 1, dtype=torch.int32, device=view.device)

        def compute() -> tuple[Tensor, Tensor]:
            known = torch.where(tokens < 0, self._last_tokens[owners], tokens)
            batch = AttentionBatch(
                starts, lengths.int(), self._tables, owners.int(), positions, slots, 1, self._max_seq_len,
                workspace=workspace,
            )  # fmt: skip
            if fused:
                logits = FusedDecode(self._model, self._tuner).logits(known, batch, self._pool.layers)
            else:
                logits = self._model.raw_logits(self._model(known, batch, self._pool.layers))
            drawn = argmax(logits, self._argmax)
            self._last_tokens.index_copy_(0, owners, drawn)
            return logits, drawn

        return compute
