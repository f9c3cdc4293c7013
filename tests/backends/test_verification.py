"""What the tuner accepts as the reference's answer, NaN and infinities included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import venturi as vt
from venturi.backends.base import RegionView, disagreement, masks_operands
from venturi.engine.builder import stored_weights
from venturi.frontends.onnx_import import import_onnx

NAN, INF = float("nan"), float("inf")


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    "got, want, hide, accepted",
    [
        (t(1, 2), t(1, 2), False, True),
        (t(1, 3), t(1, 2), False, False),
        (t(1, NAN), t(1, NAN), False, True),
        (t(1, INF), t(1, NAN), False, True),
        (t(1, 2), t(1, NAN), False, False),
        (t(1, NAN), t(1, 2), False, False),
        (t(1, 2), t(1, NAN), True, True),
        (t(1, NAN), t(1, 2), True, False),
        (t(5, 2), t(1, NAN), True, False),
        (t(1, NAN), t(1, NAN), True, True),
    ],
)
def test_special_values(got, want, hide, accepted):
    assert (disagreement(got, want, 4, may_hide=hide) is None) is accepted


def attention(mask=None, **attributes):
    net = vt.Network("attention")
    q, k, v = (net.input(n, (1, 2, 96, 16)) for n in "qkv")
    net.output("y", net.attention(q, k, v, *([] if mask is None else [mask]), **attributes))
    return net


@pytest.mark.parametrize(
    "net, masks",
    [
        (attention(), False),
        (attention(is_causal=1), True),
        (attention(np.arange(96)[None].repeat(96, 0) < 50), True),
    ],
    ids=["plain", "causal", "mask"],
)
def test_which_operators_leave_elements_out(net, masks):
    model = import_onnx(net.to_model())
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert masks_operands(RegionView(node, stored_weights(model.graph))) is masks


def test_kernels_that_skip_masked_blocks_are_offered():
    """A NaN among the keys spreads over all rows by the formula, and only over the rows that see it in a tiled kernel."""
    step = next(s for s in vt.build(attention(is_causal=1), device="cpu").plan.steps if "Attention" in s.ops)
    reasons = {m.tactic: m.reason for m in step.measurements}
    assert reasons["aten-sdpa"] == "", reasons
