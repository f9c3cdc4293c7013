"""Masks that mask nothing are dropped, all others stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import check, optimize


@pytest.mark.parametrize(
    "mask, dropped",
    [
        (np.ones((1, 1, 5, 7), bool), True),
        (np.zeros((5, 7), np.float32), True),
        (np.arange(7)[None].repeat(5, 0) < 6, False),
        (np.full((5, 7), -1e-4, np.float32), False),
        (np.ones((5, 6), bool), False),
        (np.ones((5, 1), bool), False),
    ],
    ids=["all-true", "all-zero", "one-false", "small-bias", "short-masks-the-rest", "one-key"],
)
def test_masks_that_mask_nothing_are_dropped(mask: Any, dropped: bool) -> None:
    net = vt.Network("mask")
    q, k, v = net.input("q", (2, 3, 5, 8)), net.input("k", (2, 3, 7, 8)), net.input("v", (2, 3, 7, 8))
    net.output("y", net.attention(q, k, v, mask))
    model = optimize(net)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert (len(node.inputs) < 4 or node.inputs[3] is None) is dropped
    check(net, model)


def test_computed_masks_stay() -> None:
    net = vt.Network("mask")
    q = net.input("q", (2, 3, 5, 8))
    net.output("y", net.attention(q, q, q, net.input("mask", (5, 5), "bool")))
    model = optimize(net)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert node.inputs[3] is not None


@pytest.mark.parametrize(
    "mask, dropped",
    [
        (np.ones((1, 1, 5, 1), bool), True),
        (np.zeros((5, 1), np.float32), True),
        (np.arange(5)[:, None] < 4, False),
        (np.full((5, 1), 0.5, np.float32), False),
    ],
    ids=["all-true", "all-zero", "one-false", "bias"],
)
def test_masks_repeated_over_the_batch_are_looked_through(mask: Any, dropped: bool) -> None:
    net = vt.Network("mask")
    q, k, v = net.input("q", ("n", 3, 5, 8)), net.input("k", ("n", 3, 7, 8)), net.input("v", ("n", 3, 7, 8))
    shape = net.concat(net.shape(q, start=0, end=1), np.array([1, 5, 7]), axis=0)
    net.output("y", net.attention(q, k, v, net.expand(mask, shape)))
    model = optimize(net)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert (len(node.inputs) < 4 or node.inputs[3] is None) is dropped
    check(net, model)


def test_a_mask_whose_width_is_not_known_stays() -> None:
    net = vt.Network("mask")
    q, width = net.input("q", (2, 3, 5, 8)), net.input("width", (1,), "int64")
    shape = net.concat(np.array([5]), width, axis=0)
    net.output("y", net.attention(q, q, q, net.expand(np.ones((1, 1), bool), shape)))
    model = optimize(net)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert node.inputs[3] is not None
