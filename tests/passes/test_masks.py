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


def _tril(kind: str, n: int = 5, lead: tuple[int, ...] = ()) -> Any:
    seen = np.broadcast_to(np.tril(np.ones((n, n), bool)), (*lead, n, n))
    return seen if kind == "bool" else np.where(seen, 0, {"inf": -np.inf, "min": -3.4e38}[kind]).astype(np.float32)


def _last_hidden(mask: Any) -> Any:
    mask = mask.copy()
    mask[-1, 0] = False
    return mask


@pytest.mark.parametrize(
    "mask, causal",
    [
        (_tril("bool"), True),
        (_tril("bool", lead=(1, 3)), True),
        (_tril("inf"), True),
        (_tril("min", lead=(2, 1)), True),
        (_last_hidden(_tril("bool")), False),
        (_tril("bool").T, False),
        (np.where(_tril("bool"), 0, -5).astype(np.float32), False),
        (np.where(_tril("bool"), 0.5, -np.inf).astype(np.float32), False),
    ],
    ids=["bool", "bool-4d", "inf", "least-number", "one-more-hidden", "transposed", "small-bias", "bias-on-seen"],
)
def test_triangles_become_an_attribute(mask: Any, causal: bool) -> None:
    net = vt.Network("mask")
    q, k, v = (net.input(n, (2, 3, 5, 8)) for n in "qkv")
    net.output("y", net.attention(q, k, v, mask))
    model = optimize(net)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert (len(node.inputs) < 4 or node.inputs[3] is None) is causal
    assert bool(node.attributes.get("is_causal") and node.attributes["is_causal"].value) is causal
    check(net, model)


def test_a_triangle_over_more_keys_than_queries_stays_a_mask() -> None:
    net = vt.Network("mask")
    q, k = net.input("q", (2, 3, 5, 8)), net.input("k", (2, 3, 7, 8))
    net.output("y", net.attention(q, k, k, np.tril(np.ones((5, 7), bool))))
    model = optimize(net)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert node.inputs[3] is not None
