"""Computes steps on CUDA: decode steps as replayed graphs, others launched; tokens stay on the device between steps.

`pool[slot]` holds the newest token of the sequence in that slot, so that a step can be launched before the tokens of
the one before it are known on the host. Inputs travel in one pinned buffer; tokens come back with an event.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from venturi.kernels.attention import AttentionBatch
from venturi.kernels.triton_kernels.prefill import prefill_config, tiles
from venturi.llm import long_chunks
from venturi.llm.config import CudaGraphConfig
from venturi.llm.decode_graphs import DecodeGraphs, Replayed
from venturi.llm.history import TokenHistory
from venturi.llm.kv.pool import KvPool
from venturi.llm.models.decoder import Decoder
from venturi.llm.request import Sequence
from venturi.llm.runner import prompt_logprobs
from venturi.llm.sampler import Drawing, draw
from venturi.llm.scheduler.plan import StepPlan, StepResult
from venturi.llm.staging import Staging
from venturi.llm.step_inputs import InputBuilder, StepInputs


@dataclass
class LaunchedStep:
    """Tokens on their way to the host."""

    seqs: list[Sequence]
    drawing: Drawing | None
    tokens: Tensor
    arrived: torch.cuda.Event
    answer: StepResult

    def result(self) -> StepResult:
        self.arrived.synchronize()
        if self.drawing is not None:
            self.answer.tokens = self.tokens.tolist()
            self.answer.details = self.drawing.details(self.seqs, self.answer.tokens)
        return self.answer


class CudaRunner:
    """A StepRunner over a Decoder and a KvPool on one GPU. Steps may be launched before earlier ones are collected.

    Args:
        max_slots: sequences at once. graphs: which decode steps are captured. max_tokens: tokens of the largest step.
        shipped: a folder with choices of kernels that came with the model.
    """

    def __init__(
        self, model: Decoder, pool: KvPool, max_slots: int, max_seq_len: int, graphs: CudaGraphConfig, max_tokens: int,
        shipped: Path | None = None,
    ) -> None:  # fmt: skip
        self.model, self.pool, self.device = model, pool, pool.device
        max_blocks = -(-max_seq_len // pool.block_tokens) + 1
        self._builder = InputBuilder(max_slots, max_blocks, pool.block_tokens)
        self._builder.track_changes()
        self.tables = torch.zeros((max_slots + 1, max_blocks), dtype=torch.int32, device=self.device)
        self.tables[max_slots] = pool.num_blocks
        self.last_tokens = torch.zeros(max_slots + 1, dtype=torch.int64, device=self.device)
        self._staging = Staging(self.device)
        self._history = TokenHistory(max_slots, self.device)
        self._lazy = graphs.lazy
        self._stream = torch.cuda.Stream(self.device)
        self._tile = prefill_config(max(layer.attention.cache_k_dim for layer in model.spec.layers)).queries
        self.long_refusal = long_chunks.refusal(model.spec, model.embed_tokens.weight.dtype, pool.dtype, self.device)
        self._graphs = DecodeGraphs(model, pool, self.tables, self.last_tokens, graphs, max_slots, max_seq_len, shipped)

    @property
    def choices(self) -> Path:
        """The user's file of kernels chosen for linear layers; there may be none yet."""
        return self._graphs.choices

    def describe_graphs(self) -> str:
        return self._graphs.describe()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture all graphs if that is asked for. Called by the thread that launches, before the first step."""
        if not self._lazy:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                self._graphs.capture_all()

    def close(self) -> None:
        """Wait for the device and free graphs and cache. No step may be launched afterwards."""
        self._stream.synchronize()
        self._graphs.clear()
        self.pool.close()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        self.pool.apply(plan.moves)
        answer, seqs = StepResult([]), plan.draw_seqs
        drawing: Drawing | None = None
        replayed: Replayed | None = None
        if plan.chunks:
            inputs = self._builder.build(plan)
            self._upload_tables()
            if plan.decode_only and len(seqs) == len(plan.chunks) and self._graphs.covers(len(seqs)):
                replayed = self._graphs.run(inputs)
                drawing = draw(replayed.logits, seqs, plan.draw_positions, self._history, replayed.tokens)
            else:
                logits = self._compute(inputs, plan, answer)
                drawing = draw(logits, seqs, plan.draw_positions, self._history) if seqs else None
        if replayed is not None and drawing is not None and drawing.tokens is replayed.tokens:
            tokens = replayed.on_host
        else:
            tokens = torch.empty(len(seqs), dtype=torch.int64, pin_memory=True)
            if drawing is not None:
                self._remember(inputs, drawing.tokens)
                tokens.copy_(drawing.tokens, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(self._stream)
        return LaunchedStep(seqs, drawing, tokens, arrived, answer)

    def _compute(self, inputs: StepInputs, plan: StepPlan, answer: StepResult) -> Tensor:
        """The modules, kernel by kernel. Returns the logits of the samples' rows."""
        groups = long_chunks.group(inputs) if self.long_refusal is None else []
        without = {i for group in groups for i in group}
        tile_seq, tile_start = tiles(inputs.query_starts.tolist(), self._tile, inputs.num_decodes, without)
        fields = self._staging.upload(
            inputs.tokens, inputs.owners, inputs.positions, inputs.slots, inputs.query_starts, inputs.seq_lens,
            inputs.sequence_slots, np.array(tile_seq, dtype=np.int64),
            np.array(tile_start, dtype=np.int64), inputs.sample_rows,
        )  # fmt: skip
        tokens, owners, positions, slots, starts, lengths, rows, sequences, offsets, picked = fields
        known = torch.where(tokens < 0, self.last_tokens[owners], tokens)
        batch = AttentionBatch(
            starts.int(), lengths.int(), self.tables, rows.int(), positions, slots, inputs.max_query,
            int(inputs.seq_lens.max()), num_decodes=inputs.num_decodes,
            long_chunks=[long_chunks.upload(inputs, g, self.pool.block_tokens, self._staging) for g in groups],
        )  # fmt: skip
        batch.workspace.update(tile_seq=sequences.int(), tile_start=offsets.int())
        hidden = self.model(known, batch, self.pool.layers)
        answer.prompt_logprobs = prompt_logprobs(self.model, hidden, inputs, plan.chunks)
        return self.model.logits(hidden[picked]) if len(inputs.sample_rows) else hidden

    def _remember(self, inputs: StepInputs, tokens: Tensor) -> None:
        (slots,) = self._staging.upload(inputs.sample_slots)
        self.last_tokens.index_copy_(0, slots, tokens)

    def _upload_tables(self) -> None:
        places, values = self._builder.take_changes()
        if len(places):
            at, blocks = self._staging.upload(places, values)
            self.tables.view(-1).index_copy_(0, at, blocks.int())
