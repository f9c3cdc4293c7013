"""From logits to tokens for the samples of a step: per-request edits of logits, then one draw for all rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from venturi.kernels.sampling import sample
from venturi.llm.history import TokenHistory
from venturi.llm.logit_edits import Edited, edit_logits
from venturi.llm.request import Logprob, Sequence, TokenLogprobs
from venturi.llm.scheduler.plan import Detail


@dataclass
class Drawing:
    """A draw on the device. `raw`: log-softmax rows where asked for, before the edits; of beams, which go by them,
    after."""

    tokens: Tensor
    edited: Edited = field(default_factory=Edited)
    logprob_rows: list[int] = field(default_factory=list)
    raw: Tensor | None = None

    def details(self, seqs: list[Sequence], tokens: list[int]) -> dict[int, Detail]:
        """Log probabilities and errors on the host; `tokens` are self.tokens fetched."""
        found = {i: Detail(error=error) for i, error in self.edited.all_errors().items()}
        if self.raw is None:
            return found
        for row, index in enumerate(self.logprob_rows):
            request, token = seqs[index].request, tokens[index]
            top = 2 * request.width if request.beam is not None else request.params.logprobs or 0
            entries = top_logprobs(self.raw[row], token, top)
            detail = found.setdefault(index, Detail())
            detail.logprob = entries[token].logprob
            if request.beam is not None or request.params.logprobs is not None:
                detail.top = entries
        return found


def draw(
    logits: Tensor, seqs: list[Sequence], positions: list[int], history: TokenHistory, greedy: Tensor | None = None
) -> Drawing:
    """Draw a token for each row of `logits` [rows, vocab], which may be edited in place.

    Row i is for position positions[i] of seqs[i]. `history` penalizes, and counts what is drawn. `greedy`: the rows'
    largest logits, if they are already known.
    """
    requests = [seq.request for seq in seqs]
    if greedy is not None and all(r.plainly_greedy for r in requests):
        return Drawing(greedy)
    logits = logits.float()
    logprob_rows = [i for i, r in enumerate(requests) if r.wants_logprobs]
    raw = logits[logprob_rows].log_softmax(-1) if logprob_rows else None
    edited = edit_logits(logits, seqs, positions, history)
    for place, i in enumerate(logprob_rows):
        if raw is not None and requests[i].beam is not None and requests[i].edits_logits:
            raw[place] = logits[i].log_softmax(-1)
    tokens = _drawn(logits, seqs, positions)
    history.remember(seqs, positions, tokens)
    return Drawing(tokens, edited, logprob_rows, raw)


def _drawn(logits: Tensor, seqs: list[Sequence], positions: list[int]) -> Tensor:
    requests = [seq.request for seq in seqs]
    if all(r.params.temperature == 0 for r in requests):
        return logits.argmax(-1)
    table = np.array([(r.params.temperature, r.params.top_p, r.params.min_p) for r in requests], dtype=np.float32)
    floats = torch.from_numpy(table).to(logits.device)
    rows = [(r.params.top_k, seed_of(seq), at) for r, seq, at in zip(requests, seqs, positions)]
    ints = torch.tensor(rows, dtype=torch.int64).to(logits.device)
    truncated = bool((table[:, 1] < 1).any() or (table[:, 2] > 0).any() or any(r.params.top_k for r in requests))
    return sample(
        logits, floats[:, 0], ints[:, 0], floats[:, 1], floats[:, 2], ints[:, 1], ints[:, 2], truncated=truncated
    )


def seed_of(seq: Sequence) -> int:
    """Continuations of one request draw differently."""
    return (seq.request.seed + 0x9E3779B97F4A7C15 * seq.index) & (2**62 - 1)


def top_logprobs(row: Tensor, token: int, count: int) -> TokenLogprobs:
    """The chosen token's log probability and the `count` largest ones."""
    own = float(row[token])
    found = {token: Logprob(own, int((row > own).sum()) + 1)}
    if count:
        values, tokens = row.topk(min(count, len(row)))
        for rank, (value, other) in enumerate(zip(values.tolist(), tokens.tolist())):
            found.setdefault(other, Logprob(value, rank + 1))
    return found
