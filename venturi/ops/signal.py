"""Fourier transforms, windows and the mel filter bank."""

from __future__ import annotations

import math

import numpy as np
import torch

from venturi.ir.dtypes import DT
from venturi.ops.table import op
from venturi.ops.tensors import STORAGE, widen

T = torch.Tensor


def _complex(x: T) -> T:
    """[..., 1 or 2] real → complex [...]."""
    wide = x.double()
    if x.shape[-1] == 1:
        return torch.complex(wide[..., 0], torch.zeros_like(wide[..., 0]))
    return torch.view_as_complex(wide.contiguous())


@op("DFT", ulps=256)
def dft(x: T, length: T | None = None, axis: T | None = None, *, inverse: int = 0, onesided: int = 0) -> T:
    where = -2 if axis is None else int(axis.reshape(()))
    dim = where % x.dim()
    z = _complex(x)
    n = int(length.reshape(())) if length is not None else None
    if inverse and onesided:
        n = n or 2 * (x.shape[dim] - 1)
        real: T = torch.fft.irfft(z, n, dim)
        return real[..., None].to(x.dtype)
    y = torch.fft.ifft(z, n, dim) if inverse else torch.fft.fft(z, n, dim)
    if onesided:
        y = y.narrow(dim, 0, y.shape[dim] // 2 + 1)
    return torch.view_as_real(y.resolve_conj().contiguous()).to(x.dtype)


@op("STFT", ulps=256)
def stft(x: T, step: T, window: T | None = None, length: T | None = None, *, onesided: int = 1) -> T:
    if length is not None:
        size = int(length.reshape(()))
    else:
        size = window.shape[0] if window is not None else x.shape[1]
    frames = _complex(x).unfold(1, size, int(step.reshape(())))
    if window is not None:
        frames = frames * widen(window)
    y = torch.fft.fft(frames, dim=-1)
    if onesided:
        y = y[..., : size // 2 + 1]
    return torch.view_as_real(y.contiguous()).to(x.dtype)


def _window(name: str, *coefficients: float) -> None:
    def reference(size: T, *, output_datatype: int = 1, periodic: int = 1) -> T:
        n = int(size.reshape(()))
        angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / max(n if periodic else n - 1, 1))
        y = torch.zeros(n, dtype=torch.float64)
        for k, c in enumerate(coefficients):
            y = y + (-1) ** k * c * torch.cos(k * angle)
        return y.to(STORAGE[DT(output_datatype)])

    op(name, ulps=16)(reference)


_window("HannWindow", 0.5, 0.5)
_window("HammingWindow", 25 / 46, 21 / 46)
_window("BlackmanWindow", 0.42, 0.5, 0.08)


@op("MelWeightMatrix", ulps=64)
def mel_weight_matrix(bins: T, dft_length: T, rate: T, low: T, high: T, *, output_datatype: int = 1) -> T:
    count, size = int(bins), int(dft_length)
    spectrum = size // 2 + 1
    mel = 2595 * np.log10(1 + np.array([float(low), float(high)]) / 700)
    steps = mel[0] + np.arange(count + 2) * (mel[1] - mel[0]) / (count + 2)
    edges = 700 * (10 ** (steps / 2595) - 1)
    at = ((size + 1) * edges // int(rate)).astype(np.int64)
    out = np.zeros((spectrum, count))
    for i in range(count):
        start, centre, end = at[i : i + 3]
        if centre == start:
            out[centre, i] = 1
        else:
            out[start : centre + 1, i] = (np.arange(start, centre + 1) - start) / (centre - start)
        if end > centre:
            out[centre:end, i] = (end - np.arange(centre, end)) / (end - centre)
    return torch.from_numpy(out).to(STORAGE[DT(output_datatype)])
