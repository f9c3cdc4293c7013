"""The ONNX node conformance table: interpreter and compiled engine beside onnxruntime, by the same harness.

Run: make conformance
"""

from __future__ import annotations

import argparse
import time
import warnings

from rich.console import Console
from rich.table import Table

from benchmarks.report import save
from tests.conformance import runners
from tests.conformance.cases import KINDS, newest, pinned


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", action="store_true", help="also run onnxruntime")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    suites = {"onnx 1.21.0 node": list(pinned()), "newest node": list(newest("node")),
              "newest, all kinds": [c for k in KINDS for c in newest(k)]}  # fmt: skip
    backends = {"interpreter": runners.interpreter, "engine": runners.engine}
    peers = {}
    if options.peer:
        import onnxruntime

        backends["onnxruntime"] = runners.onnxruntime
        peers["onnxruntime"] = onnxruntime.__version__
    table = Table("suite", "cases", *(f"{b} passes" for b in backends), *(f"{b} s" for b in backends))
    results = []
    for name, cases in suites.items():
        passed, seconds = {}, {}
        for backend, make in backends.items():
            start = time.perf_counter()
            passed[backend] = sum(runners.check(c, make) is None for c in cases)
            seconds[backend] = round(time.perf_counter() - start, 1)
        table.add_row(name, str(len(cases)), *map(str, passed.values()), *map(str, seconds.values()))
        results.append({"suite": name, "cases": len(cases), "passed": passed, "seconds": seconds})
    Console().print(table)
    print(save("conformance", results, peers))


if __name__ == "__main__":
    main()
