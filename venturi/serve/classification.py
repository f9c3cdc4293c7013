"""The classification extension: the k best of an output's rows as "value:index[:label]" strings."""

from __future__ import annotations

import numpy as np

from venturi.serve.request import Tensor
from venturi.serve.tensors import BYTES, Array


def classify(tensor: Tensor, k: int, labels: tuple[str, ...], *, batched: bool) -> Tensor:
    """[rows, k] strings where the model batches, else [k]; fewer when the output is smaller. Largest first."""
    data = tensor.data
    rows: Array = data.reshape(len(data) if batched and data.ndim else 1, -1)
    count = min(k, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    out = np.empty((rows.shape[0], count), dtype=object)
    for i, best in enumerate(order):
        for j, index in enumerate(best):
            label = f":{labels[index]}" if index < len(labels) else ""
            out[i, j] = f"{_number(rows[i, index])}:{index}{label}".encode()
    return Tensor(tensor.name, BYTES, out if batched else out.reshape(-1))


def _number(value: object) -> str:
    return f"{float(value):f}" if isinstance(value, np.floating) else str(value)
