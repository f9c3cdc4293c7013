"""Damages bytes reproducibly: flips bits, truncates, duplicates, zeroes and swaps pieces."""

from __future__ import annotations

import random


def mutate(data: bytes, seed: int) -> bytes:
    """A damaged copy of `data`; the same seed gives the same damage. Never equal to `data`."""
    rng = random.Random(seed)
    out = bytearray(data)
    kind = seed % 6
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    if kind == 1:
        at, size = rng.randrange(len(out)), rng.randrange(1, 64)
        return bytes(out[:at] + bytes(rng.randrange(256) for _ in range(size)) + out[at:])
    if kind == 2:
        at = rng.randrange(len(out))
        return bytes(out[:at] + out[at + rng.randrange(1, 256) :]) or b"\0"
    for _ in range(rng.choice((1, 1, 1, 4, 16))):
        at = rng.randrange(len(out))
        if kind == 3:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 4:
            out[at] ^= rng.randrange(1, 256)
        else:
            end = min(len(out), at + rng.randrange(1, 32))
            out[at:end] = bytes(b ^ 0xFF for b in out[at:end])
    return bytes(out) if bytes(out) != data else bytes(out[:-1])
