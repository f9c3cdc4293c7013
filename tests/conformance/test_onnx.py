"""The ONNX backend suite: pinned release (node cases) and newest release (all kinds), interpreter and engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conformance import runners
from tests.conformance.cases import KINDS, newest, pinned
from tests.conformance.xfails import NEWEST, PINNED

RUNNERS = {"interpreter": runners.interpreter, "engine": runners.engine}


def _params(cases: list[Any], xfails: dict[str, str]) -> list[Any]:
    found = []
    for case in cases:
        for name in RUNNERS:
            reason = xfails.get(case.name)
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            found.append(pytest.param(case, name, id=f"{case.name}-{name}", marks=marks))
    return found


@pytest.mark.parametrize("case, runner", _params(list(pinned()), PINNED))
def test_pinned_release(case: Any, runner: str) -> None:
    assert runners.check(case, RUNNERS[runner]) is None


@pytest.mark.parametrize("case, runner", _params([c for k in KINDS for c in newest(k)], NEWEST))
def test_newest_release(case: Any, runner: str) -> None:
    assert runners.check(case, RUNNERS[runner]) is None


def test_suite_is_complete() -> None:
    """The Makefile fetches the pinned release; without it most cases would silently be missing."""
    assert len(pinned()) == 1678
    assert sum(len(newest(k)) for k in KINDS) >= 2024
    names = {c.name for c in pinned()}
    assert set(PINNED) <= names, sorted(set(PINNED) - names)


def test_bar() -> None:
    """At least 1600 of the 1678 node cases pass, by the arithmetic of the strict xfails above."""
    assert len(pinned()) - len(PINNED) >= 1600
