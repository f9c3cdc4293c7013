"""Computes steps with torch, synchronously: the runner of the CPU, and the one that is easiest to read."""

from __future__ import annotations

import torch
from torch import Tensor

from venturi.kernels.attention import AttentionBatch
from venturi.llm.cpu_code import generated_attention
from venturi.llm.history import TokenHistory
from venturi.llm.kv.pool import KvPool
from venturi.llm.models.decoder import Decoder
from venturi.llm.request import TokenLogprobs
from venturi.llm.sampler import draw, top_logprobs
from venturi.llm.scheduler.plan import Chunk, StepPlan, StepResult
from venturi.llm.step_inputs import InputBuilder, StepInputs


class Finished:
    """A step that was computed when it was launched."""

    def __init__(self, answer: StepResult) -> None:
        self._answer = answer

    def result(self) -> StepResult:
        return self._answer


class TorchRunner:
    """A StepRunner over a Decoder and a KvPool on the CPU. `invariant`: see `invariant.py`."""

    def __init__(
        self, model: Decoder, pool: KvPool, max_slots: int, max_seq_len: int, *, invariant: bool = False
    ) -> None:
        self.model, self.pool, self._invariant = model, pool, invariant
        self._attention = generated_attention(always=invariant)
        self._history = TokenHistory(max_slots, pool.device)
        self._builder = InputBuilder(max_slots, -(-max_seq_len // pool.block_tokens) + 1, pool.block_tokens)

    def prepare(self) -> None:
        pass

    def close(self) -> None:
        """Free the cache. No step may be launched afterwards."""
        self.pool.close()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Finished:
        self.pool.apply(plan.moves)
        if not plan.chunks:
            return Finished(StepResult([]))
        inputs = self._builder.build(plan)
        batch = attention_batch(inputs)
        batch.generated = self._attention
        hidden = self.model(torch.from_numpy(inputs.tokens), batch, self.pool.layers)
        answer = StepResult([], prompt_logprobs=prompt_logprobs(self.model, hidden, inputs, plan.chunks))
        if plan.draw_seqs:
            logits = self.model.logits(hidden[torch.from_numpy(inputs.sample_rows)])
            rows = 1 if self._invariant else len(logits)
            for at in range(0, len(logits), rows):
                seqs, positions = plan.draw_seqs[at : at + rows], plan.draw_positions[at : at + rows]
                drawing = draw(logits[at : at + rows], seqs, positions, self._history)
                tokens = drawing.tokens.tolist()
                answer.tokens += tokens
                answer.details |= {at + i: d for i, d in drawing.details(seqs, tokens).items()}
        return Finished(answer)


def attention_batch(inputs: StepInputs) -> AttentionBatch:
    return AttentionBatch(
        query_starts=torch.from_numpy(inputs.query_starts.astype("int32")),
        seq_lens=torch.from_numpy(inputs.seq_lens.astype("int32")),
        block_tables=torch.from_numpy(inputs.tables),
        table_rows=torch.arange(len(inputs.tables)),
        positions=torch.from_numpy(inputs.positions),
        slots=torch.from_numpy(inputs.slots),
        max_query=inputs.max_query,
        max_keys=int(inputs.seq_lens.max()),
        num_decodes=inputs.num_decodes,
        host=(inputs.query_starts.tolist(), inputs.seq_lens.tolist()),
    )


def prompt_logprobs(
    model: Decoder, hidden: Tensor, inputs: StepInputs, chunks: list[Chunk]
) -> dict[int, list[TokenLogprobs]]:
    """Log probabilities of prompt tokens, for chunks whose requests ask for them. Position 0 has none."""
    found: dict[int, list[TokenLogprobs]] = {}
    for index, chunk in enumerate(chunks):
        count, prompt = chunk.seq.request.params.prompt_logprobs, chunk.seq.request.prompt
        if count is None or chunk.start >= len(prompt) - 1 or len(chunk.seq.request.prompt_logprobs) > chunk.start:
            continue
        first, last = chunk.start, min(chunk.end, len(prompt) - 1)
        row = int(inputs.query_starts[index])
        rows = model.logits(hidden[row : row + last - first]).log_softmax(-1)
        found[index] = [top_logprobs(rows[p - first], prompt[p + 1], count) for p in range(first, last)]
    return found
