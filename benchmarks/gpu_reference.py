"""Runs the ONNX node cases through the interpreter on a CUDA device: which references are device-independent.

Run on a machine with a GPU: python -m benchmarks.gpu_reference OUT.json
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

from tests.conformance.cases import newest
from tests.conformance.runners import Run, check
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx


def on_cuda(model: Any) -> Run:
    program = Interpreter(import_onnx(model).graph, device="cuda")
    return lambda inputs: list(program.run(inputs).values())


def main() -> None:
    warnings.simplefilter("ignore")
    failures = {c.name: reason for c in newest("node") if (reason := check(c, on_cuda)) is not None}
    total = len(newest("node"))
    data = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": total,
        "passed": total - len(failures), "failures": failures,
    }  # fmt: skip
    with open(sys.argv[1], "w") as file:
        json.dump(data, file, indent=1)
    print(f"{data['passed']} of {total} on {data['device']}")


if __name__ == "__main__":
    main()
