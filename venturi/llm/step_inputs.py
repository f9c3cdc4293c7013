"""The numbers a step needs on the device, as numpy arrays built from a StepPlan. Used by the runners."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from venturi.llm.request import Sequence
from venturi.llm.scheduler.plan import StepPlan

Ints = NDArray[np.int64]


@dataclass
class StepInputs:
    """Fields as in `AttentionBatch`. tokens: -1 where the token is only on the device, in `owners`' slot."""

    tokens: Ints
    owners: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    seq_lens: Ints
    tables: NDArray[np.int32]
    sample_rows: Ints
    sample_slots: Ints
    sequence_slots: Ints
    num_decodes: int
    max_query: int


class InputBuilder:
    """Builds StepInputs; keeps the block tables of running sequences between steps, by slot."""

    def __init__(self, max_slots: int, max_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.tables = np.zeros((max_slots, max_blocks), dtype=np.int32)
        self._seen: list[Sequence | None] = [None] * max_slots
        self._versions = [-1] * max_slots
        self._changes: list[tuple[Ints, Ints]] | None = None

    def track_changes(self) -> None:
        """From now on, remember which table entries change (for a copy of the tables elsewhere)."""
        self._changes = []

    def take_changes(self) -> tuple[Ints, Ints]:
        """Flat places and values of the entries that changed since the last call."""
        changes, self._changes = self._changes or [], []
        if not changes:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate([c[0] for c in changes]), np.concatenate([c[1] for c in changes])

    def build(self, plan: StepPlan) -> StepInputs:
        chunks = plan.chunks
        seen, versions = self._seen, self._versions
        for chunk in chunks:
            seq = chunk.seq
            slot, version = seq.slot, seq.table.version
            if versions[slot] != version or seen[slot] is not seq:
                self._update(slot, np.array(seq.table.blocks, dtype=np.int32))
                seen[slot], versions[slot] = seq, version
        slots = np.array([c.seq.slot for c in chunks], dtype=np.int64)
        starts = np.array([c.start for c in chunks], dtype=np.int64)
        ends = np.array([c.end for c in chunks], dtype=np.int64)
        counts = ends - starts
        query_starts = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_starts[1:])
        if plan.decode_only:
            tokens = np.array([c.seq.tokens[c.start] for c in chunks], dtype=np.int64)
            owners, positions = slots, starts
        else:
            tokens = np.concatenate([np.array(c.seq.tokens[c.start : c.end], dtype=np.int64) for c in chunks])
            owners = np.repeat(slots, counts)
            positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], counts)
        blocks = self.tables[owners, positions // self.block_tokens].astype(np.int64)
        wide = int(-(-ends.max() // self.block_tokens)) if len(chunks) else 1
        return StepInputs(
            tokens=tokens,
            owners=owners,
            positions=positions,
            slots=blocks * self.block_tokens + positions % self.block_tokens,
            query_starts=query_starts,
            seq_lens=ends,
            tables=self.tables[slots, :wide],
            sample_rows=np.repeat(query_starts[1:] - 1, [c.draws for c in chunks]),
            sequence_slots=slots,
            sample_slots=np.array([seq.slot for seq in plan.draw_seqs], dtype=np.int64),
            max_query=int(counts.max()) if len(chunks) else 0,
            num_decodes=int(np.argmax(counts != 1)) if len(chunks) and not plan.decode_only else len(chunks),
        )

    def _update(self, slot: int, blocks: NDArray[np.int32]) -> None:
        row = self.tables[slot, : len(blocks)]
        if self._changes is not None:
            changed = np.flatnonzero(row != blocks)
            self._changes.append((changed + slot * self.tables.shape[1], blocks[changed].astype(np.int64)))
        row[:] = blocks
