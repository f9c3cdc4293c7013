"""What every launcher needs: the PDL switch and the number of multiprocessors."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from venturi.core.knobs import bool_knob

PDL_KNOB = bool_knob("VENTURI_LLM_PDL", True, "Overlap the start of a kernel with the end of the one before (sm_90+).")


@cache
def _supports_pdl(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 9


def pdl(x: torch.Tensor) -> bool:
    """Whether kernels on x's device are launched with programmatic dependent launch."""
    return x.is_cuda and _supports_pdl(x.device.index or 0) and PDL_KNOB.get()


def options(x: torch.Tensor) -> dict[str, Any]:
    """Launch options that go with PDL=pdl(x)."""
    return {"PDL": True, "launch_pdl": True} if pdl(x) else {"PDL": False}


@cache
def num_sms(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
