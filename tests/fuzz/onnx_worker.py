"""Imports and builds damaged ONNX models in a process of its own, so that a crash or hang there is seen, not shared.

Usage: python -m tests.fuzz.onnx_worker FILE FIRST COUNT. Prints one line a case before it, and a JSON summary.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings

import venturi as vt
from tests.fuzz.mutate import mutate

MEMORY_BYTES = 8 << 30


def main() -> None:
    path, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")
    with open(path, "rb") as file:
        data = file.read()
    summary = {"refused": 0, "built": 0}
    unexpected = []
    for seed in range(first, first + count):
        print(f"case {seed}", file=sys.stderr, flush=True)
        try:
            vt.build(mutate(data, seed), opt_level=0)
            summary["built"] += 1
        except vt.VenturiError:
            summary["refused"] += 1
        except Exception as exc:
            unexpected.append(f"seed {seed}: {type(exc).__name__}: {str(exc)[:200]}")
    print(json.dumps({**summary, "unexpected": unexpected}))


if __name__ == "__main__":
    main()
