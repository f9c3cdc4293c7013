"""Who holds which cache block: tables of sequences, reuse of prefixes, copy-on-write, swapping to host memory.

Pure accounting. What it decides about memory (copies between blocks) is collected as `Moves`, which the runner carries
out before it computes the step, in this order: out to host, copy on the device, in from host.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from venturi.core.errors import InternalError
from venturi.llm.kv.blocks import BlockPool
from venturi.llm.kv.prefix import Node, PrefixTree

_versions = itertools.count(1)


@dataclass
class BlockTable:
    """The blocks of one sequence, in order of position. `published` blocks are in the prefix tree, up to `node`.

    `version` is new with every change of `blocks`, unlike any other table's: copies know when they are stale.
    """

    version: int = 0
    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    published: int = 0
    node: Node | None = None


@dataclass
class Moves:
    """Copies of whole blocks as (source, destination)."""

    swap_out: list[tuple[int, int]] = field(default_factory=list)
    copy: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.swap_out or self.copy or self.swap_in)


class KvCache:
    """Accounting of `num_blocks` blocks of `block_tokens` tokens each. Not thread-safe; allocates no tensors."""

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        *,
        reuse: bool = True,
        partial_reuse: bool = True,
        host_blocks: int = 0,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.host = BlockPool(host_blocks)
        self.block_tokens = block_tokens
        self.tree = PrefixTree(block_tokens)
        self.reuse, self.partial_reuse = reuse, partial_reuse
        self.moves = Moves()
        self._num_evictable = 0
        self._host_leaving: list[int] = []

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free ones, and cached ones that nobody holds."""
        return self.pool.num_free + self._num_evictable

    @property
    def num_cached(self) -> int:
        return len(self.tree)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def cached_tokens(self, tokens: list[int]) -> int:
        """How many leading tokens a new sequence would find in the cache (whole blocks only). Changes nothing."""
        if not self.reuse:
            return 0
        return len(self.tree.match(tokens, len(tokens) - 1, False).nodes) * self.block_tokens

    def start(self, table: BlockTable, tokens: list[int]) -> int:
        """Give an empty table the cached prefix of its tokens; returns the tokens that need no computing.

        At least the last token is left to compute. A partly agreeing block is copied when a block is to be had.
        """
        if not self.reuse:
            return 0
        match = self.tree.match(tokens, len(tokens) - 1, self.partial_reuse)
        for node in match.nodes:
            self._hold(node.block)
            self.tree.touch(node)
            table.blocks.append(node.block)
        table.version = next(_versions)
        table.published = len(match.nodes)
        table.node = match.nodes[-1] if match.nodes else self.tree.root
        reused = len(match.nodes) * self.block_tokens
        if match.partial is None:
            return reused
        source = match.partial.block
        self._hold(source)
        if self.num_available:
            block = self._take()
            self.moves.copy.append((source, block))
            table.blocks.append(block)
            reused += match.partial_tokens
        self._drop(source)
        return reused

    def missing(self, table: BlockTable, start: int, end: int) -> int:
        """Blocks that `extend` would take."""
        missing = self.blocks_for(end) - len(table.blocks)
        return missing + self._shared_block(table, start)

    def extend(self, table: BlockTable, start: int, end: int) -> bool:
        """Put own blocks under positions start..end-1. False, and nothing changed, when too few are left."""
        need = self.missing(table, start, end)
        if need <= 0:
            return True
        if need > self.num_available:
            return False
        table.version = next(_versions)
        if self._shared_block(table, start):
            index = start // self.block_tokens
            old, block = table.blocks[index], self._take()
            self.moves.copy.append((old, block))
            table.blocks[index] = block
            self._drop(old)
        while len(table.blocks) * self.block_tokens < end:
            table.blocks.append(self._take())
        return True

    def fork(self, parent: BlockTable, child: BlockTable) -> None:
        """The child shares all blocks of the parent; whoever writes into a shared block first copies it."""
        for block in parent.blocks:
            self._hold(block)
        child.blocks = list(parent.blocks)
        child.version = next(_versions)
        child.published, child.node = parent.published, parent.node

    def publish(self, table: BlockTable, tokens: list[int], num_computed: int) -> None:
        """Enter the full blocks of tokens[:num_computed] into the tree. A block that is there already replaces ours."""
        size = self.block_tokens
        if not self.reuse or (table.published + 1) * size > num_computed:
            return
        node = table.node or self.tree.root
        for index in range(table.published, num_computed // size):
            key, own = tuple(tokens[index * size : (index + 1) * size]), table.blocks[index]
            known = self.tree.child(node, key)
            if known is None:
                node = self.tree.insert(node, key, own)
            else:
                if known.block != own:
                    self._hold(known.block)
                    table.blocks[index] = known.block
                    table.version = next(_versions)
                    self._drop(own)
                node = known
        table.node, table.published = node, num_computed // size

    def release(self, table: BlockTable) -> None:
        """Give back everything the table holds. Published blocks stay cached until they are evicted."""
        for block in reversed(table.blocks):
            self._drop(block)
        for block in table.host_blocks:
            self.host.drop(block)
            self._host_leaving.append(block)
        table.blocks, table.host_blocks, table.published, table.node = [], [], 0, None
        table.version = next(_versions)

    def swap_out(self, table: BlockTable) -> bool:
        """Move the table's blocks to host memory. False, and nothing changed, when the host has too little room."""
        if not table.blocks or self.host.num_free < len(table.blocks):
            return False
        host = [self.host.take() for _ in table.blocks]
        self.moves.swap_out += zip(table.blocks, host)
        for block in reversed(table.blocks):
            self._drop(block)
        table.blocks, table.host_blocks, table.published, table.node = [], host, 0, None
        table.version = next(_versions)
        return True

    def swap_in(self, table: BlockTable) -> bool:
        """Bring swapped blocks back. False, and nothing changed, when the device has too little room."""
        if len(table.host_blocks) > self.num_available:
            return False
        table.blocks = [self._take() for _ in table.host_blocks]
        self.moves.swap_in += zip(table.host_blocks, table.blocks)
        for block in table.host_blocks:
            self.host.drop(block)
            self._host_leaving.append(block)
        table.host_blocks = []
        table.version = next(_versions)
        return True

    def take_moves(self) -> Moves:
        """The moves collected since the last call. Host blocks that a swap-in reads become free from here on."""
        moves, self.moves = self.moves, Moves()
        last_source = {destination: source for source, destination in moves.copy}
        moves.copy = [(source, destination) for destination, source in last_source.items()]
        for block in self._host_leaving:
            self.host.free(block)
        self._host_leaving = []
        return moves

    def clear(self) -> int:
        """Forget every cached prefix that nobody uses; returns the number of blocks."""
        count = self._num_evictable
        for _ in range(count):
            self.pool.free(self.tree.evict(self.pool.refs))
        self._num_evictable = 0
        return count

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise InternalError unless every block is free, cached or held exactly as often as the tables say."""
        held, host = Counter[int](), Counter[int]()
        for table in tables:
            held.update(table.blocks)
            host.update(table.host_blocks)
        free, cached = self.pool.free_blocks(), set(self.tree.by_block)
        evictable = sum(not self.pool.refs[b] for b in cached)
        problems = [
            f"block {b}: {self.pool.refs[b]} holders counted, tables hold it {held[b]} times"
            for b in range(self.pool.num_blocks)
            if self.pool.refs[b] != held[b]
        ]
        if len(set(free)) != len(free):
            problems.append("a block is free twice")
        if set(free) & (cached | set(held)):
            problems.append("a free block is cached or held")
        if len(set(free) | cached | set(held)) != self.pool.num_blocks:
            problems.append("a block is neither free, cached nor held")
        if evictable != self._num_evictable:
            problems.append(f"{self._num_evictable} evictable blocks counted, there are {evictable}")
        if self.host.num_free + len(self._host_leaving) + len(host) != self.host.num_blocks:
            problems.append("a host block is lost")
        if problems:
            raise InternalError("KV cache accounting is broken: " + "; ".join(problems[:5]))

    def _shared_block(self, table: BlockTable, start: int) -> int:
        index = start // self.block_tokens
        return int(index < len(table.blocks) and self.pool.refs[table.blocks[index]] > 1)

    def _take(self) -> int:
        if not self.pool.num_free:
            self.pool.free(self.tree.evict(self.pool.refs))
            self._num_evictable -= 1
        return self.pool.take()

    def _hold(self, block: int) -> None:
        if not self.pool.refs[block]:
            self._num_evictable -= 1
        self.pool.share(block)

    def _drop(self, block: int) -> None:
        if not self.pool.drop(block):
            return
        node = self.tree.by_block.get(block)
        if node is None:
            self.pool.free(block)
        else:
            self._num_evictable += 1
            self.tree.offer(node)
