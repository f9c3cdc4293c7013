"""A radix tree over full cache blocks: which prompt prefixes are already in the cache. Knows tokens and blocks only.

                     root
              ┌───────┴────────┐
     (t0..t31) block 7   (u0..u31) block 2        one node = one block of tokens
         ┌────┴────┐
     block 9    block 4                           a path from the root spells a prefix

A node whose block nobody holds is evictable; leaves go first, least recently used first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    tokens: Tokens
    block: int
    parent: Node | None
    children: dict[Tokens, Node] = field(default_factory=dict)
    last_used: int = 0


@dataclass(frozen=True)
class Match:
    """A cached prefix: `nodes` cover whole blocks, then `partial_tokens` more tokens agree with `partial`'s block."""

    nodes: list[Node]
    partial: Node | None
    partial_tokens: int


class PrefixTree:
    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.root = Node((), -1, None)
        self.by_block: dict[int, Node] = {}
        self._clock = 0
        self._offers = 0
        self._leaves: list[
            tuple[int, int, Node]
        ] = []  # a heap of (last use, tie-break, leaf); stale entries are skipped

    def __len__(self) -> int:
        return len(self.by_block)

    def match(self, tokens: list[int], limit: int, partial: bool) -> Match:
        """The longest cached prefix of tokens[:limit]."""
        size, node, nodes, start = self.block_tokens, self.root, [], 0
        while start + size <= limit:
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            nodes.append(child)
            node, start = child, start + size
        best, best_tokens = None, 0
        if partial and start < limit:
            rest = tokens[start : min(limit, start + size)]
            for child in node.children.values():
                common = _common(child.tokens, rest)
                if common > best_tokens:
                    best, best_tokens = child, common
        return Match(nodes, best, best_tokens)

    def child(self, node: Node, tokens: Tokens) -> Node | None:
        return node.children.get(tokens)

    def insert(self, parent: Node, tokens: Tokens, block: int) -> Node:
        node = Node(tokens, block, parent)
        parent.children[tokens] = node
        self.by_block[block] = node
        self.touch(node)
        return node

    def touch(self, node: Node) -> None:
        self._clock += 1
        node.last_used = self._clock

    def offer(self, node: Node) -> None:
        """Nobody holds the node's block any more: if it is a leaf it may be evicted."""
        if node.children:
            return
        self._offers += 1
        heapq.heappush(self._leaves, (node.last_used, self._offers, node))
        if len(self._leaves) > 2 * len(self.by_block) + 64:
            latest = {entry[2].block: entry for entry in self._leaves if not self._stale(entry)}
            self._leaves = sorted(latest.values())

    def evict(self, refs: list[int]) -> int:
        """Remove the least recently used leaf that nobody holds; return its block. There must be one."""
        while True:
            entry = heapq.heappop(self._leaves)
            node = entry[2]
            if self._stale(entry) or refs[node.block]:
                continue
            self.remove(node)
            parent = node.parent
            if parent is not None and parent is not self.root and not refs[parent.block]:
                self.offer(parent)
            return node.block

    def _stale(self, entry: tuple[int, int, Node]) -> bool:
        used, _, node = entry
        return bool(node.children) or node.last_used != used or self.by_block.get(node.block) is not node

    def remove(self, node: Node) -> None:
        assert node.parent is not None, "the root is never removed"
        del node.parent.children[node.tokens]
        del self.by_block[node.block]


def _common(a: Tokens, b: list[int]) -> int:
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n
