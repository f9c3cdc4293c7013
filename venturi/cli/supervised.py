"""Commands that try kernels on a GPU do so in a process of their own: what hangs or faults there is killed with it, and
the work goes on in the next one, which passes over it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from venturi.cli.output import errors
from venturi.core.errors import LostDeviceError
from venturi.core.knobs import SUPERVISED

COMMANDS = ("build", "tune")
MOST_STARTS, MOST_CRASHES = 20, 3
_PDEATHSIG = 1
_DRIVER = Path("/dev/nvidiactl")
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


def is_wanted(args: Sequence[str]) -> bool:
    """Whether the command may try kernels on a GPU, and is not yet watched over."""
    if not args or args[0] not in COMMANDS or SUPERVISED.get() or not _DRIVER.exists():
        return False
    given = dict(zip(args, [*args[1:], ""]))
    device = given.get("--device", next((a.partition("=")[2] for a in args if a.startswith("--device=")), ""))
    idle = {"--help", "-h", "--no-tune", "--deterministic"} & set(args)
    return device != "cpu" and not idle and not any(a.startswith("--target") for a in args)


def run(args: Sequence[str], command: Sequence[str] = (sys.executable, "-m", "venturi")) -> int:
    """The exit status of the command, which is started again while kernels take its process with them."""
    environment = os.environ | {SUPERVISED.name: "1"}
    crashes = 0
    for _ in range(MOST_STARTS):
        status = _finished(subprocess.Popen([*command, *args], env=environment, preexec_fn=_die_with_parent))
        crashed = -status in _CRASHES
        crashes += crashed
        if status != LostDeviceError.status and (not crashed or crashes > MOST_CRASHES):
            return 128 - status if status < 0 else status
        errors.print("[yellow]a kernel hung or faulted[/]: going on without it", highlight=False)
    errors.print(f"[bold red]error[/]: {MOST_STARTS} kernels in a row hung or faulted; is the GPU well?")
    return 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)


def _finished(child: subprocess.Popen[bytes]) -> int:
    """Its exit status. An interrupt reaches the child as well, which ends in its own way; a second one kills it."""
    interrupts = 0
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                child.kill()
