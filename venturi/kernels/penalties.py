"""Repetition, presence and frequency penalties from counts of the tokens that a sequence has."""

from __future__ import annotations

import torch
from torch import Tensor

IN_PROMPT = 1 << 24  # added to the count of a token that the prompt has


def penalize(
    logits: Tensor, counts: Tensor, rows: Tensor, slots: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Edit rows of logits in place, each by the counts of its slot.

    A token of prompt or output has its logit divided by `repetition`, multiplied where it is not positive; one that the
    output has n times loses presence + n * frequency more.

    Args:
        logits: [rows, vocab] fp32. counts: [slots, vocab] int32, times in the output, plus IN_PROMPT. rows, slots:
            [n] int64. repetition, presence, frequency: [n] fp32.
    """
    if logits.is_cuda:
        from venturi.kernels.triton_kernels.penalties import penalize as on_device

        on_device(logits, counts, rows, slots, repetition, presence, frequency)
        return
    for place, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist())):
        seen, x = counts[slot], logits[row]
        times = (seen & (IN_PROMPT - 1)).float()
        factor = repetition[place]
        x = torch.where(seen != 0, torch.where(x > 0, x / factor, x * factor), x)
        logits[row] = x - (presence[place] * (times > 0) + frequency[place] * times)
