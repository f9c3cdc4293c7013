"""`venturi devices` and `venturi knobs`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from venturi.cli.output import console, emit_json, table


def devices(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """The devices an engine can be built for, and the libraries in use."""
    from venturi.core.fingerprint import cpu_name, num_physical_threads, versions

    rows = [["cpu", cpu_name(), f"{num_physical_threads()} threads"], *_gpus()]
    if as_json:
        emit_json({"devices": [{"device": d, "name": n, "detail": t} for d, n, t in rows], "versions": versions()})
        return
    console.print(table("devices", ["device", "name", "detail"], rows))
    console.print(", ".join(f"{k} {v}" for k, v in versions().items()), highlight=False)


def _gpus() -> list[list[str]]:
    import torch

    rows = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        detail = f"sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB"
        rows.append([f"cuda:{i}", p.name, detail])
    return rows


def all_knobs() -> list[dict[str, str]]:
    """Every knob with its default, meaning, and present value. Imports what declares them."""
    import venturi.kernels.triton_kernels.launch
    import venturi.ops.control  # noqa: F401
    from venturi.core.knobs import KNOBS

    return [
        {"name": n, "default": repr(k.default), "value": os.environ.get(n, ""), "help": k.help}
        for n in KNOBS
        for k in [KNOBS.get(n)]
    ]


def knobs(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """The VENTURI_* environment variables."""
    found = all_knobs()
    if as_json:
        emit_json(found)
        return
    console.print(table("environment", ["name", "default", "set to", "meaning"], [list(k.values()) for k in found]))
