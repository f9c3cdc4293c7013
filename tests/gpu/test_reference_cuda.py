"""The interpreter on a CUDA device: the same ONNX cases, the same meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu_reference import on_cuda
from tests.conformance import runners
from tests.conformance.cases import newest
from tests.conformance.xfails import NEWEST

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("case", [c for c in newest("node") if c.name not in NEWEST], ids=lambda c: c.name)
def test_case(case: Any) -> None:
    assert runners.check(case, on_cuda) is None
