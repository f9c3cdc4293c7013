"""Recurrent networks: RNN, GRU, LSTM with every activation and direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from venturi.core.errors import ModelError
from venturi.ops.table import op

T = torch.Tensor
_ACTIVATIONS: dict[str, Callable[[T, float | None, float | None], T]] = {
    "relu": lambda x, a, b: torch.relu(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "affine": lambda x, a, b: (1.0 if a is None else a) * x + (0.0 if b is None else b),
    "leakyrelu": lambda x, a, b: F.leaky_relu(x, 0.01 if a is None else a),
    "thresholdedrelu": lambda x, a, b: torch.where(x > (1.0 if a is None else a), x, torch.zeros_like(x)),
    "scaledtanh": lambda x, a, b: (1.0 if a is None else a) * torch.tanh((1.0 if b is None else b) * x),
    "hardsigmoid": lambda x, a, b: torch.clamp((0.2 if a is None else a) * x + (0.5 if b is None else b), 0, 1),
    "elu": lambda x, a, b: F.elu(x, 1.0 if a is None else a),
    "softsign": lambda x, a, b: F.softsign(x),
    "softplus": lambda x, a, b: F.softplus(x),
}
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
Step = Callable[..., tuple[T, ...]]


def _activations(kind: str, attrs: dict[str, Any], directions: int) -> list[list[Callable[[T], T]]]:
    names = attrs.get("activations") or _DEFAULTS[kind] * directions
    alphas, betas = list(attrs.get("activation_alpha") or []), list(attrs.get("activation_beta") or [])
    clip = attrs.get("clip")
    out: list[Callable[[T], T]] = []
    for name in names:
        fn = _ACTIVATIONS.get(name.lower())
        if fn is None:
            raise ModelError(f"{kind} activation {name!r} is unknown; known: {sorted(_ACTIVATIONS)}")
        takes_alpha = name.lower() in (
            "affine",
            "leakyrelu",
            "thresholdedrelu",
            "scaledtanh",
            "hardsigmoid",
            "elu",
        )
        takes_beta = name.lower() in ("affine", "scaledtanh", "hardsigmoid")
        a = alphas.pop(0) if takes_alpha and alphas else None
        b = betas.pop(0) if takes_beta and betas else None
        out.append(_bound(fn, a, b, clip))
    per = len(out) // directions
    return [out[i * per : (i + 1) * per] for i in range(directions)]


def _bound(fn: Callable[..., T], a: float | None, b: float | None, clip: float | None) -> Callable[[T], T]:
    return lambda x: fn(x if clip is None else x.clamp(-clip, clip), a, b)


def _run(
    kind: str,
    x: T,
    w: T,
    r: T,
    b: T | None,
    lengths: T | None,
    states: list[T | None],
    p: T | None,
    attrs: dict[str, Any],
) -> tuple[T, list[T]]:
    """x [time, batch, in] → outputs [time, directions, batch, hidden] and the last states, per direction stacked."""
    hidden, directions = attrs.get("hidden_size") or r.shape[-1], w.shape[0]
    acts = _activations(kind, attrs, directions)
    outputs, finals = [], []
    for d in range(directions):
        backward = attrs.get("direction") == "reverse" or d == 1
        state = [s[d] if s is not None else x.new_zeros(x.shape[1], hidden) for s in states]
        bias = b[d] if b is not None else x.new_zeros(2 * w.shape[1])
        wb, rb = bias.chunk(2)
        step = _STEPS[kind](r[d], rb, acts[d], None if p is None else p[d], attrs)
        projected = torch.matmul(x, w[d].T) + wb
        ys: list[T] = [x.new_zeros(x.shape[1], hidden)] * x.shape[0]
        for t in reversed(range(x.shape[0])) if backward else range(x.shape[0]):
            new = step(projected[t], *state)
            if lengths is None:
                state, ys[t] = list(new), new[0]
            else:
                live = (t < lengths).to(x.device)[:, None]
                state = [torch.where(live, n, s) for n, s in zip(new, state)]
                ys[t] = torch.where(live, new[0], torch.zeros_like(new[0]))
        outputs.append(torch.stack(ys) if ys else x.new_zeros(0, x.shape[1], hidden))
        finals.append(state)
    return torch.stack(outputs, 1), [torch.stack([f[i] for f in finals]) for i in range(len(states))]


def _rnn_step(r: T, rb: T, acts: list[Callable[[T], T]], p: T | None, attrs: dict[str, Any]) -> Step:
    return lambda xw, h: (acts[0](xw + h @ r.T + rb),)


def _gru_step(r: T, rb: T, acts: list[Callable[[T], T]], p: T | None, attrs: dict[str, Any]) -> Step:
    size = r.shape[-1]

    def step(xw: T, h: T) -> tuple[T, ...]:
        xz, xr, xh = xw.split(size, -1)
        gates = h @ r[: 2 * size].T + rb[: 2 * size]
        z, reset = acts[0](xz + gates[:, :size]), acts[0](xr + gates[:, size:])
        if attrs.get("linear_before_reset"):
            candidate = acts[1](xh + reset * (h @ r[2 * size :].T + rb[2 * size :]))
        else:
            candidate = acts[1](xh + (reset * h) @ r[2 * size :].T + rb[2 * size :])
        return ((1 - z) * candidate + z * h,)

    return step


def _lstm_step(r: T, rb: T, acts: list[Callable[[T], T]], p: T | None, attrs: dict[str, Any]) -> Step:
    size = r.shape[-1]
    peep = p.split(size) if p is not None else (0.0, 0.0, 0.0)

    def step(xw: T, h: T, c: T) -> tuple[T, ...]:
        gi, go, gf, gc = (xw + h @ r.T + rb).split(size, -1)
        i = acts[0](gi + peep[0] * c)
        f = 1 - i if attrs.get("input_forget") else acts[0](gf + peep[2] * c)
        cell = f * c + i * acts[1](gc)
        o = acts[0](go + peep[1] * cell)
        return o * acts[2](cell), cell

    return step


_STEPS: dict[str, Callable[..., Step]] = {"RNN": _rnn_step, "GRU": _gru_step, "LSTM": _lstm_step}


def _recurrent(
    kind: str,
    x: T,
    w: T,
    r: T,
    b: T | None,
    lengths: T | None,
    states: list[T | None],
    p: T | None,
    layout: int,
    attrs: dict[str, Any],
) -> tuple[T, ...]:
    if layout:
        x = x.transpose(0, 1)
        states = [None if s is None else s.transpose(0, 1) for s in states]
    y, last = _run(kind, x, w, r, b, lengths, states, p, attrs)
    if layout:
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)
    return y, *last


@op("RNN", ulps=128)
def rnn(
    x: T, w: T, r: T, b: T | None = None, lengths: T | None = None, h0: T | None = None, *,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, layout: int = 0,
) -> tuple[T, ...]:  # fmt: skip
    attrs = {"activation_alpha": activation_alpha, "activation_beta": activation_beta, "activations": activations,
             "clip": clip, "direction": direction, "hidden_size": hidden_size}  # fmt: skip
    return _recurrent("RNN", x, w, r, b, lengths, [h0], None, layout, attrs)


@op("GRU", ulps=128)
def gru(
    x: T, w: T, r: T, b: T | None = None, lengths: T | None = None, h0: T | None = None, *,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, layout: int = 0, linear_before_reset: int = 0,
) -> tuple[T, ...]:  # fmt: skip
    attrs = {"activation_alpha": activation_alpha, "activation_beta": activation_beta, "activations": activations,
             "clip": clip, "direction": direction, "hidden_size": hidden_size,
             "linear_before_reset": linear_before_reset}  # fmt: skip
    return _recurrent("GRU", x, w, r, b, lengths, [h0], None, layout, attrs)


@op("LSTM", ulps=128)
def lstm(
    x: T, w: T, r: T, b: T | None = None, lengths: T | None = None, h0: T | None = None, c0: T | None = None,
    p: T | None = None, *,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, input_forget: int = 0, layout: int = 0,
) -> tuple[T, ...]:  # fmt: skip
    attrs = {"activation_alpha": activation_alpha, "activation_beta": activation_beta, "activations": activations,
             "clip": clip, "direction": direction, "hidden_size": hidden_size,
             "input_forget": input_forget}  # fmt: skip
    return _recurrent("LSTM", x, w, r, b, lengths, [h0, c0], p, layout, attrs)
