"""`venturi deploy`: the server on many machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from venturi.cli.output import console, emit_json, table
from venturi.core.errors import ModelError

app = typer.Typer(no_args_is_help=True)


@app.command("ray", epilog="Example: venturi deploy ray repository/ --max-replicas 8 --cpus 2")
def ray(
    repositories: Annotated[
        list[Path] | None, typer.Argument(metavar="REPO", help="Folders that every node can read; .onnx, .vt files.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="auto: this machine's cluster; local: start one; or host:port.")
    ] = "auto",
    name: Annotated[str, typer.Option(help="Of the Ray Serve application.")] = "venturi",
    route_prefix: Annotated[str, typer.Option(help="Path before /v2.")] = "/",
    min_replicas: Annotated[int, typer.Option(min=1, help="Replicas at least.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas at most, the least if not given; above it, Ray scales.")
    ] = None,
    target_ongoing: Annotated[float, typer.Option(help="Requests a replica that scaling aims at.")] = 16.0,
    max_ongoing: Annotated[int, typer.Option(min=1, help="Requests a replica gets at once at most.")] = 256,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of a replica; also its threads.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica.")] = 0.0,
    host: Annotated[str, typer.Option(help="Address that the proxies listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port of the proxies.")] = 8000,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until the replicas must run.")] = 600.0,
    down: Annotated[bool, typer.Option("--down", help="Drain and remove the application instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the replicas as JSON.")] = False,
) -> None:
    """Replicas of the server on a Ray cluster, with autoscaling; requests go to any node's proxy over HTTP."""
    try:
        from venturi.serve import on_ray
    except ImportError as exc:
        raise ModelError(f"the server needs {exc.name}: pip install 'venturi[serve,ray]'") from exc

    if down:
        on_ray.connect(address)
        on_ray.remove(name)
        console.print(f"removed {name}")
        return
    roots = tuple(r.resolve() for r in repositories or ())
    missing = [str(r) for r in roots if not r.exists()]
    if missing or not roots:
        raise ModelError(f"no such model repository: {', '.join(missing)}" if missing else "no model repository given; "
                         "expected folders, .onnx or .vt files that every node can read")  # fmt: skip
    settings = on_ray.RaySettings(
        roots, name, route_prefix, min_replicas, max_replicas or min_replicas, target_ongoing, max_ongoing, cpus,
        gpus, host, port,
    )  # fmt: skip
    on_ray.connect(address)
    found = on_ray.deploy(settings, timeout)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}{route_prefix.rstrip('/')}/v2"
    if as_json:
        emit_json({"url": url, "replicas": found})
    else:
        rows = [[r["replica"], r["node"][:12], r["pid"], r["state"]] for r in found]
        console.print(table(f"{name}: {url} on every node", ["replica", "node", "pid", "state"], rows))
    if address == "local":
        _stay()


def _stay() -> None:
    """A cluster that this process has started ends with it."""
    console.print("serving until Ctrl-C")
    while True:
        time.sleep(3600)
