"""From logits to tokens for the samples of a step: per-request edits of logits, then one draw for all rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from venturi.core.errors import RequestError
from venturi.kernels.sampling import sample
from venturi.llm.request import Logprob, TokenLogprobs
from venturi.llm.scheduler.plan import Drawn, Sample


@dataclass
class Drawing:
    """A draw on the device. `errors` are rows whose own processor failed; `raw` has log-softmax rows where asked for."""

    tokens: Tensor
    errors: dict[int, Exception]
    logprob_rows: list[int]
    raw: Tensor | None

    def results(self, samples: list[Sample], tokens: list[int]) -> list[Drawn]:
        """Tokens and log probabilities on the host; `tokens` are self.tokens fetched."""
        drawn = [Drawn(token, error=self.errors.get(i)) for i, token in enumerate(tokens)]
        if self.raw is not None:
            for row, index in enumerate(self.logprob_rows):
                top = _num_top(samples[index])
                entries = top_logprobs(self.raw[row], tokens[index], top)
                drawn[index].logprob = entries[tokens[index]].logprob
                if samples[index].seq.request.params.logprobs is not None or top:
                    drawn[index].top = entries
        return drawn


def draw(logits: Tensor, samples: list[Sample], greedy: Tensor | None = None) -> Drawing:
    """Draw a token for each row of `logits` [rows, vocab], which may be edited in place. Row i belongs to samples[i].

    `greedy`: the rows' largest logits before any edit, if they are already known.
    """
    if greedy is not None and all(s.seq.request.plainly_greedy for s in samples):
        return Drawing(greedy, {}, [], None)
    logits = logits.float()
    logprob_rows = [i for i, s in enumerate(samples) if wants_logprobs(s)]
    raw = logits[logprob_rows].log_softmax(-1) if logprob_rows else None
    errors = edit_logits(logits, samples)
    requests = [s.seq.request for s in samples]
    if all(r.params.temperature == 0 for r in requests):
        return Drawing(logits.argmax(-1), errors, logprob_rows, raw)
    table = np.array([_settings(s) for s in samples], dtype=np.float64)
    floats = torch.from_numpy(table[:, :3].astype(np.float32)).to(logits.device)
    ints = torch.tensor(
        [(r.params.top_k, seed_of(s), s.position) for r, s in zip(requests, samples)], dtype=torch.int64
    ).to(logits.device)
    truncated = bool((table[:, 1] < 1).any() or (table[:, 2] > 0).any() or any(r.params.top_k for r in requests))
    tokens = sample(
        logits, floats[:, 0], ints[:, 0], floats[:, 1], floats[:, 2], ints[:, 1], ints[:, 2], truncated=truncated
    )
    return Drawing(tokens, errors, logprob_rows, raw)


def seed_of(sample: Sample) -> int:
    """Continuations of one request draw differently."""
    return (sample.seq.request.seed + 0x9E3779B97F4A7C15 * sample.seq.index) & (2**62 - 1)


def wants_logprobs(sample: Sample) -> bool:
    return sample.seq.request.wants_logprobs


def top_logprobs(row: Tensor, token: int, count: int) -> TokenLogprobs:
    """The chosen token's log probability and the `count` largest ones."""
    own = float(row[token])
    found = {token: Logprob(own, int((row > own).sum()) + 1)}
    if count:
        values, tokens = row.topk(min(count, len(row)))
        for rank, (value, other) in enumerate(zip(values.tolist(), tokens.tolist())):
            found.setdefault(other, Logprob(value, rank + 1))
    return found


def _num_top(sample: Sample) -> int:
    request = sample.seq.request
    return 2 * request.width if request.beam is not None else request.params.logprobs or 0


def _settings(sample: Sample) -> tuple[float, float, float]:
    params = sample.seq.request.params
    return params.temperature, params.top_p, params.min_p


def edit_logits(logits: Tensor, samples: list[Sample]) -> dict[int, Exception]:
    """Apply every request's own edits to its row; an error in one of them is that row's alone."""
    errors: dict[int, Exception] = {}
    for i, one in enumerate(samples):
        if not one.seq.request.edits_logits:
            continue
        try:
            _edit_row(logits[i], one)
        except Exception as exc:
            errors[i] = exc if isinstance(exc, RequestError) else RequestError(f"a logits processor failed: {exc!r}")
    return errors


def _edit_row(row: Tensor, sample: Sample) -> None:
    seq, request, params = sample.seq, sample.seq.request, sample.seq.request.params
    tokens = seq.tokens[: sample.position]
    output = tokens[request.num_prompt :]
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    _penalize(row, tokens, output, sample)
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


def _penalize(row: Tensor, tokens: list[int], output: list[int], sample: Sample) -> None:
    params = sample.seq.request.params
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
