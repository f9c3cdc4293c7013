"""Commands whose process a kernel takes with it are started again, and end as their last process did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from venturi.cli import supervised
from venturi.core.errors import LostDeviceError

AGAIN = LostDeviceError.status
CHILD = """
import os, sys
from pathlib import Path
count, deeds = Path(sys.argv[1]), sys.argv[2].split(",")
n = int(count.read_text() or 0)
count.write_text(str(n + 1))
assert os.environ["VENTURI_SUPERVISED"] == "1"
deed = deeds[min(n, len(deeds) - 1)]
if deed.startswith("-"):
    os.kill(os.getpid(), -int(deed))
sys.exit(int(deed))
"""
SEGV, TERM = -int(signal.SIGSEGV), -int(signal.SIGTERM)


@pytest.mark.parametrize(
    "deeds, status, starts",
    [
        ([0], 0, 1),
        ([1], 1, 1),
        ([2], 2, 1),
        ([AGAIN, AGAIN, 0], 0, 3),
        ([SEGV, 0], 0, 2),
        ([AGAIN, 1], 1, 2),
        ([TERM], 128 - TERM, 1),
        ([SEGV], 128 - SEGV, supervised.MOST_CRASHES + 1),
        ([AGAIN], 1, supervised.MOST_STARTS),
    ],
    ids=str,
)
def test_how_often_a_command_is_started(tmp_path: Path, deeds: list[int], status: int, starts: int) -> None:
    script, count = tmp_path / "child.py", tmp_path / "count"
    script.write_text(CHILD)
    count.write_text("")
    given = [str(count), ",".join(map(str, deeds))]
    assert supervised.run(given, (sys.executable, str(script))) == status
    assert int(count.read_text()) == starts


@pytest.mark.parametrize(
    "args, wanted",
    [
        (["build", "m.onnx"], True),
        (["tune", "m.vt", "--device", "cuda:1"], True),
        (["build", "m.onnx", "--device=cuda"], True),
        (["build", "m.onnx", "--device", "cpu"], False),
        (["build", "m.onnx", "--device=cpu"], False),
        (["build", "--target", "sm_90", "--no-tune", "m.onnx"], False),
        (["build", "--help"], False),
        (["build", "m.onnx", "--deterministic"], False),
        (["run", "m.onnx"], False),
        ([], False),
    ],
    ids=str,
)
def test_which_commands_are_watched_over(args: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "_DRIVER", Path("/dev/null"))
    assert supervised.is_wanted(args) is wanted
    monkeypatch.setenv("VENTURI_SUPERVISED", "1")
    assert not supervised.is_wanted(args)
    monkeypatch.delenv("VENTURI_SUPERVISED")
    monkeypatch.setattr(supervised, "_DRIVER", Path("/nothing/there"))
    assert not supervised.is_wanted(args)


def test_a_command_that_is_killed_takes_its_process_along(tmp_path: Path) -> None:
    sleeper, record = tmp_path / "sleeper.py", tmp_path / "pid"
    sleeper.write_text("import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(300)\n")
    code = "import sys; from venturi.cli import supervised; supervised.run(sys.argv[2:], (sys.executable, sys.argv[1]))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(sleeper), str(record)])
    assert _until(lambda: record.exists() and record.read_text() != "")
    child = Path("/proc") / record.read_text()
    assert child.exists()
    parent.kill()
    parent.wait()
    assert _until(lambda: not child.exists() or "Z" in (child / "stat").read_text().split(")")[1])


def _until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


HANGING = """
import sys, time
from tests.engine.test_attempts import Fast, choose, reasons
if __name__ == "__main__":
    hanging = Fast("hanging", lambda: time.sleep(300))
    choice = choose(sys.argv[1], hanging, Fast("fine"))[1]
    print(hanging.tried, reasons(choice)["hanging"])
"""


def test_a_kernel_that_hangs_ends_its_process_and_is_passed_over(tmp_path: Path) -> None:
    script, cache = tmp_path / "hanging.py", tmp_path / "timing.json"
    script.write_text(HANGING)
    root = str(Path(__file__).parents[2])
    env = os.environ | {"VENTURI_SUPERVISED": "1", "VENTURI_CANDIDATE_S": "1", "PYTHONPATH": root}
    start = time.monotonic()

    def attempt() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(cache)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)

    first = attempt()
    assert first.returncode == AGAIN, first.stderr
    assert "has not ended after 1 s" in first.stderr
    again = attempt()
    assert again.stdout.split("\n")[0] == "0 blocked: it had not ended after 1 s", again.stderr
    assert again.returncode == 0
    assert time.monotonic() - start < 240
