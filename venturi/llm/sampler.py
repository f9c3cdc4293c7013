"""From logits to tokens for the samples of a step: per-request edits of logits, then one draw for all rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from venturi.core.errors import RequestError
from venturi.kernels.sampling import sample
from venturi.llm.request import Logprob, Sequence, TokenLogprobs
from venturi.llm.sampling_params import SamplingParams
from venturi.llm.scheduler.plan import Detail


@dataclass
class Drawing:
    """A draw on the device. `errors`: rows whose own processor failed; `raw`: log-softmax rows where asked for."""

    tokens: Tensor
    errors: dict[int, Exception] = field(default_factory=dict)
    logprob_rows: list[int] = field(default_factory=list)
    raw: Tensor | None = None

    def details(self, seqs: list[Sequence], tokens: list[int]) -> dict[int, Detail]:
        """Log probabilities and errors on the host; `tokens` are self.tokens fetched."""
        found = {i: Detail(error=error) for i, error in self.errors.items()}
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


def draw(logits: Tensor, seqs: list[Sequence], positions: list[int], greedy: Tensor | None = None) -> Drawing:
    """Draw a token for each row of `logits` [rows, vocab], which may be edited in place.

    Row i is for position positions[i] of seqs[i]. `greedy`: the rows' largest logits, if they are already known.
    """
    requests = [seq.request for seq in seqs]
    if greedy is not None and all(r.plainly_greedy for r in requests):
        return Drawing(greedy)
    logits = logits.float()
    logprob_rows = [i for i, r in enumerate(requests) if r.wants_logprobs]
    raw = logits[logprob_rows].log_softmax(-1) if logprob_rows else None
    errors = edit_logits(logits, seqs, positions)
    if all(r.params.temperature == 0 for r in requests):
        return Drawing(logits.argmax(-1), errors, logprob_rows, raw)
    table = np.array([(r.params.temperature, r.params.top_p, r.params.min_p) for r in requests], dtype=np.float32)
    floats = torch.from_numpy(table).to(logits.device)
    rows = [(r.params.top_k, seed_of(seq), at) for r, seq, at in zip(requests, seqs, positions)]
    ints = torch.tensor(rows, dtype=torch.int64).to(logits.device)
    truncated = bool((table[:, 1] < 1).any() or (table[:, 2] > 0).any() or any(r.params.top_k for r in requests))
    tokens = sample(
        logits, floats[:, 0], ints[:, 0], floats[:, 1], floats[:, 2], ints[:, 1], ints[:, 2], truncated=truncated
    )
    return Drawing(tokens, errors, logprob_rows, raw)


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


def edit_logits(logits: Tensor, seqs: list[Sequence], positions: list[int]) -> dict[int, Exception]:
    """Apply every request's own edits to its row; an error in one of them is that row's alone."""
    errors: dict[int, Exception] = {}
    for i, (seq, position) in enumerate(zip(seqs, positions)):
        if not seq.request.edits_logits:
            continue
        try:
            _edit_row(logits[i], seq, position)
        except Exception as exc:
            errors[i] = exc if isinstance(exc, RequestError) else RequestError(f"a logits processor failed: {exc!r}")
    return errors


def _edit_row(row: Tensor, seq: Sequence, position: int) -> None:
    request, params = seq.request, seq.request.params
    tokens = seq.tokens[:position]
    output = tokens[request.num_prompt :]
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    _penalize(row, tokens, output, params)
    banned = list(params.bad_token_ids) + list(_ngram_bans(tokens, params.no_repeat_ngram_size))
    banned += [word[-1] for word in request.bad_words if tokens[len(tokens) - len(word) + 1 :] == word[:-1]]
    if len(output) < params.min_tokens:
        banned += request.stop_ids
    if banned:
        row[torch.tensor(sorted(set(banned)), device=row.device)] = float("-inf")
    if seq.guide is not None:
        allowed = torch.from_numpy(seq.guide.allowed(len(row))).to(row.device)
        row.masked_fill_(~allowed, float("-inf"))
    for processor in params.processors:
        edited = processor(row, tokens)
        if edited is not None:
            row.copy_(torch.as_tensor(edited))
    if banned and bool((row == float("-inf")).all()):
        raise RequestError("every token is excluded by bad words, n-grams, min_tokens or processors")


def _penalize(row: Tensor, tokens: list[int], output: list[int], params: SamplingParams) -> None:
    if params.repetition_penalty != 1:
        ids = torch.tensor(sorted(set(tokens)), device=row.device)
        values = row[ids]
        row[ids] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(output)
        ids = torch.tensor(list(counts), device=row.device)
        amounts = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * amounts


def _ngram_bans(tokens: list[int], size: int) -> set[int]:
    """Tokens that would complete an n-gram that has occurred."""
    if not size or len(tokens) < size:
        return set()
    tail = tokens[len(tokens) - size + 1 :]
    return {tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == tail}
