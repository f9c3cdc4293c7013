"""The numbers and tokens of captured decode steps in the host's memory, which the graph itself reads and writes.

No copies stand between two replays: the host fills the entry after the last one's, the device counts replays too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from venturi.kernels.triton_kernels.step_start import FIELDS, StepNumbers

ENTRIES = 8


class StepRing:
    """Of one captured size. inputs: [ENTRIES, size, FIELDS], tokens: [ENTRIES, size], both int64 and pinned.

    An entry is filled again only when the replay that read it has ended; its tokens are gone then.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.inputs = torch.zeros((ENTRIES, size, FIELDS), dtype=torch.int64, pin_memory=True)
        self.tokens = torch.zeros((ENTRIES, size), dtype=torch.int64, pin_memory=True)
        self.numbers = StepNumbers.make(size, device)
        self._filled = self.inputs.numpy()
        self._ends: list[torch.cuda.Event | None] = [None] * ENTRIES
        self._next = 0

    def fill(self, fields: Sequence[NDArray[np.integer]], padding: Sequence[int]) -> int:
        """The entry of the next replay: `fields` rows, then `padding`. Waits while all entries are in use."""
        entry = self._next
        end = self._ends[entry]
        if end is not None:
            end.synchronize()
        rows = len(fields[0])
        table = self._filled[entry]
        for i, field in enumerate(fields):
            table[:rows, i] = field
        table[rows:, : len(padding)] = padding
        return entry

    def replayed(self, entry: int) -> None:
        """The replay that reads `entry` has been launched, on the current stream."""
        event = torch.cuda.Event()
        event.record()
        self._ends[entry] = event
        self._next = (entry + 1) % ENTRIES

    def rewind(self) -> None:
        """Back to entry 0, on the device too: after runs that were no replays."""
        self.numbers.count.zero_()
        self._next = 0
