"""Numbered cache blocks: a free list and reference counts. Used by `cache.py` for device and for host blocks."""

from __future__ import annotations

from venturi.core.errors import InternalError


class BlockPool:
    """Blocks 0..num_blocks-1. A block is taken with one holder, shared, dropped, and freed by its owner."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        block = self._free.pop()
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        self.refs[block] += 1

    def drop(self, block: int) -> bool:
        """One holder less; True when it was the last. The caller then frees the block or keeps it cached."""
        self.refs[block] -= 1
        if self.refs[block] < 0:
            raise InternalError(f"block {block} was dropped more often than it was held")
        return self.refs[block] == 0

    def free(self, block: int) -> None:
        if self.refs[block]:
            raise InternalError(f"block {block} was freed while {self.refs[block]} sequences hold it")
        self._free.append(block)

    def free_blocks(self) -> list[int]:
        return list(self._free)
