"""What requests ask to be done to their logits before a token is drawn: bias, penalties, bans, grammars, processors."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from torch import Tensor

from venturi.core.errors import RequestError
from venturi.llm.history import TokenHistory
from venturi.llm.request import Sequence


@dataclass
class Edited:
    """errors: of rows whose own processor or guide failed. banned: rows with bans; nothing_left, on the device: whether
    all of the row is excluded."""

    errors: dict[int, Exception] = field(default_factory=dict)
    banned: list[int] = field(default_factory=list)
    nothing_left: Tensor | None = None

    def all_errors(self) -> dict[int, Exception]:
        """Waits for the device when there were bans."""
        left = [] if self.nothing_left is None else self.nothing_left.tolist()
        text = "every token is excluded by bad words, n-grams, min_tokens or processors"
        return {row: RequestError(text) for row, none in zip(self.banned, left) if none} | self.errors


def edit_logits(logits: Tensor, seqs: Many[Sequence], positions: Many[int], history: TokenHistory) -> Edited:
    """Edit rows of logits, [rows, vocab] fp32, in place; row i is for positions[i] of seqs[i].

    Bias, penalties and bans are done for all rows at once; an error in a guide or a processor is its row's alone.
    """
    edited = Edited()
    rows = [i for i, seq in enumerate(seqs) if seq.request.edits_logits]
    if not rows:
        return edited
    biases = [(i, token, bias) for i in rows for token, bias in seqs[i].request.params.logit_bias.items()]
    if biases:
        at, tokens = _places(((i, token) for i, token, _ in biases), logits)
        logits.index_put_((at, tokens), torch.tensor([b for *_, b in biases]).to(logits.device), accumulate=True)
    history.penalize(logits, seqs, positions)
    bans = {i: found for i in rows if (found := banned(seqs[i], positions[i]))}
    if bans:
        at, tokens = _places(((i, token) for i, found in bans.items() for token in found), logits)
        logits.index_put_((at, tokens), torch.tensor(float("-inf")).to(logits.device))
    for i in rows:
        try:
            _of_its_own(logits[i], seqs[i], positions[i])
        except Exception as exc:
            edited.errors[i] = (
                exc if isinstance(exc, RequestError) else RequestError(f"a logits processor failed: {exc!r}")
            )
    if bans:
        edited.banned = list(bans)
        edited.nothing_left = (logits[edited.banned] == float("-inf")).all(-1)
    return edited


def banned(seq: Sequence, position: int) -> set[int]:
    """Tokens that may not be at this position. Tokens so far are read only where bad words or n-grams are asked for."""
    request, params = seq.request, seq.request.params
    found = set(params.bad_token_ids)
    if position - request.num_prompt < params.min_tokens:
        found |= request.stop_ids
    if request.bad_words or params.no_repeat_ngram_size:
        tokens = seq.tokens[:position]
        found |= {word[-1] for word in request.bad_words if tokens[len(tokens) - len(word) + 1 :] == word[:-1]}
        found |= _ngram_bans(tokens, params.no_repeat_ngram_size)
    return found


def _places(pairs: Iterable[tuple[int, int]], logits: Tensor) -> Tensor:
    """[2, n] int64: rows and tokens."""
    return torch.tensor(list(pairs), dtype=torch.int64).T.to(logits.device)


def _of_its_own(row: Tensor, seq: Sequence, position: int) -> None:
    if seq.guide is not None:
        allowed = torch.from_numpy(seq.guide.allowed(len(row))).to(row.device)
        row.masked_fill_(~allowed, float("-inf"))
    for processor in seq.request.params.processors:
        edited = processor(row, seq.tokens[:position])
        if edited is not None:
            row.copy_(torch.as_tensor(edited))


def _ngram_bans(tokens: list[int], size: int) -> set[int]:
    """Tokens that would complete an n-gram that has occurred."""
    if not size or len(tokens) < size:
        return set()
    tail = tokens[len(tokens) - size + 1 :]
    return {tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == tail}
