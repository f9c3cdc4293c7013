"""Which tokens each running sequence has, counted on the device: penalties need nothing that the host has to know."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from venturi.core.errors import InternalError
from venturi.kernels.penalties import IN_PROMPT, penalize
from venturi.llm.request import PENDING, Sequence


class TokenHistory:
    """A row of counts for every slot, allocated when the first penalized request comes. Used by one thread.

    A sequence keeps its slot for life, so a row is filled once, from its prompt, and then follows what is drawn. Beams
    exchange their tokens: their rows are filled every time.
    """

    def __init__(self, max_slots: int, device: torch.device) -> None:
        self._slots, self._device = max_slots, device
        self._counts: Tensor | None = None
        self._known: dict[int, tuple[int, int, int]] = {}

    def penalize(self, logits: Tensor, seqs: Many[Sequence], positions: Many[int]) -> None:
        """Edit the logits, [rows, vocab] fp32, of penalized sequences; row i is for positions[i] of seqs[i]."""
        rows = [i for i, seq in enumerate(seqs) if seq.request.params.penalizes]
        if not rows:
            return
        counts = self._table(logits.shape[1])
        for i in rows:
            self._follow(counts, seqs[i], positions[i])
        params = [seqs[i].request.params for i in rows]
        amounts = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        places = torch.tensor([rows, [seqs[i].slot for i in rows]]).to(self._device)
        penalize(logits, counts, *places, *torch.tensor(amounts).T.contiguous().to(self._device))

    def remember(self, seqs: Many[Sequence], positions: Many[int], tokens: Tensor) -> None:
        """Count what was drawn: tokens[i], on the device, is at positions[i] of seqs[i]."""
        rows = [i for i, seq in enumerate(seqs) if seq.request.params.penalizes and seq.request.beam is None]
        if not rows or self._counts is None:
            return
        places = torch.tensor([rows, [seqs[i].slot for i in rows]]).to(self._device)
        where = places[1] * self._counts.shape[1] + tokens[places[0]]
        self._counts.view(-1).index_add_(0, where, torch.ones_like(where, dtype=torch.int32))
        for i in rows:
            self._known[seqs[i].slot] = (seqs[i].request.id, seqs[i].index, positions[i] + 1)

    def _table(self, vocab: int) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros(self._slots, vocab, dtype=torch.int32, device=self._device)
        return self._counts

    def _follow(self, counts: Tensor, seq: Sequence, position: int) -> None:
        request = seq.request
        if request.beam is None and self._known.get(seq.slot) == (request.id, seq.index, position):
            return
        tokens = seq.tokens[:position]
        if PENDING in tokens:
            raise InternalError(f"request {request.id} is penalized for tokens that nobody counted")
        prompt, output = (
            torch.tensor(part, dtype=torch.int64).to(self._device)
            for part in (tokens[: request.num_prompt], tokens[request.num_prompt :])
        )
        row = counts[seq.slot].zero_()
        row[prompt] = IN_PROMPT
        row.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self._known[seq.slot] = (request.id, seq.index, position)
