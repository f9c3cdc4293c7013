"""The `venturi` command: collects the commands, maps errors to exit codes."""

from __future__ import annotations

import sys

import typer

from venturi.cli import (
    analyze,
    bench,
    build,
    check,
    debug,
    demo,
    deploy,
    devices,
    inspect,
    llm,
    perf,
    run,
    serve,
    supervised,
    surgeon,
    timings,
)
from venturi.cli.output import fail
from venturi.cli.serve_options import ServeCommand
from venturi.core.errors import LostDeviceError, VenturiError
from venturi.core.knobs import SUPERVISED

app = typer.Typer(
    name="venturi",
    help="Compile trained models into tuned engines and run them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("build", epilog="Example: venturi build model.onnx -o model.vt --precision bf16")(build.build)
app.command("tune", epilog="Example: venturi tune model.vt --budget 60")(build.tune)
app.command("bench", epilog="Example: venturi bench model.vt --shapes x:8x3x224x224 --json")(bench.bench)
app.command("run", epilog="Example: venturi run model.onnx --backends venturi,reference,onnxruntime")(run.run)
app.command("check", epilog="Example: venturi check model.onnx")(check.check)
app.command("demo", epilog="Example: venturi demo")(demo.demo)
app.command("devices", epilog="Example: venturi devices --json")(devices.devices)
app.command("knobs", epilog="Example: VENTURI_DEBUG=2 venturi knobs")(devices.knobs)
app.add_typer(inspect.app, name="inspect", help="Look at a model, an engine, a plan, or what is supported.")
app.add_typer(surgeon.app, name="surgeon", help="Cut, clean and strip ONNX files.")
app.add_typer(debug.app, name="debug", help="Find what makes a model or a build go wrong.")
app.add_typer(timings.app, name="timings", help="Look at timing caches, merge and clear them.")
app.command("serve", cls=ServeCommand, epilog="Example: venturi serve model.onnx --http-port 8000")(serve.serve)
app.command("perf", epilog="Example: venturi perf resnet --concurrency 1:8:1 --json")(perf.perf)
app.command("analyze", epilog="Example: venturi analyze repository/ -m resnet --latency-ms 50 -o report.html")(
    analyze.analyze
)
app.add_typer(deploy.app, name="deploy", help="Run the server on many machines.")
app.add_typer(llm.app, name="llm", help="Generate, chat and benchmark with language models.")


@app.callback()
def root() -> None:
    """Compile trained models into tuned engines and run them."""


def _with_inspect_kind(args: list[str]) -> list[str]:
    """`venturi inspect FILE` looks at the file's ending: .vt is an engine, anything else a model."""
    kinds = {"model", "engine", "plan", "capability"}
    if len(args) > 1 and args[0] == "inspect" and args[1] not in kinds and not args[1].startswith("-"):
        return ["inspect", "engine" if args[1].endswith(".vt") else "model", *args[1:]]
    return args


def main() -> None:
    """Exit status: 0 fine, 1 a VenturiError or a failed comparison, 2 wrong usage."""
    args = _with_inspect_kind(sys.argv[1:])
    try:
        if supervised.is_wanted(args):
            sys.exit(supervised.run(args))
        app(args)
    except LostDeviceError as exc:
        fail(exc)
        sys.exit(exc.status if SUPERVISED.get() else 1)
    except VenturiError as exc:
        fail(exc)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
