"""Runs one case through the interpreter, the compiled engine, or onnxruntime; returns why it fails, or None."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import venturi as vt
from tests.conformance.cases import Case, mismatch
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx

Run = Callable[[dict[str, Any]], list[Any]]


def check(case: Case, make: Callable[[Any], Run]) -> str | None:
    """Any exception is a failure with its text."""
    try:
        model = case.model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = make(model)
            names = [v.name for v in model.graph.input]
            for inputs, wanted in case.data_sets():
                got = run(dict(zip(names, inputs)))
                if len(got) != len(wanted):
                    return f"{len(got)} outputs, expected {len(wanted)}"
                for g, w in zip(got, wanted):
                    if reason := mismatch(g, w):
                        return reason
    except Exception as exc:
        return f"{type(exc).__name__}: {str(exc)[:200]}"
    return None


def interpreter(model: Any) -> Run:
    program = Interpreter(import_onnx(model).graph)
    return lambda inputs: list(program.run(inputs).values())


def engine(model: Any) -> Run:
    """Twice: the first run binds shapes and plans the arena, the second uses it."""
    compiled = vt.build(model, opt_level=0)

    def run(inputs: dict[str, Any]) -> list[Any]:
        compiled.run(inputs)
        return list(compiled.run(inputs).values())

    return run


def onnxruntime(model: Any) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda inputs: list(session.run(None, inputs))
