"""Cubins by key: those an engine file brought, the user's cache, or compiled now in worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from venturi.backends.cuda.kernel import Cubin, KernelSource
from venturi.core.errors import EngineError, TuningError, VenturiError
from venturi.core.fingerprint import num_physical_threads
from venturi.core.folders import cache_folder

COMPILE_SECONDS = 60.0
MAX_WORKERS = 32


def default_folder() -> Path:
    """Where cubins and generated sources are kept for this user."""
    return cache_folder() / "cuda"


class KernelStore:
    """Thread-safe for `get`. `used` holds every cubin handed out: what an engine file must carry.

    `compiles=False` refuses to compile: loading an engine must work without Triton.
    """

    def __init__(
        self, given: Mapping[str, Cubin] | None = None, folder: Path | None = None, compiles: bool = True
    ) -> None:
        self.used: dict[str, Cubin] = {}
        self._given = dict(given or {})
        self._failed: dict[str, str] = {}
        self._folder = default_folder() if folder is None else folder
        self._compiles = compiles

    def get(self, source: KernelSource) -> Cubin:
        """Raises TuningError when the source does not compile, EngineError when it would have to but may not."""
        found = self._given.get(source.key) or self._cached(source.key)
        if found is None and source.key not in self._failed:
            if not self._compiles:
                raise EngineError(f"the engine file lacks kernel {source.name} ({source.key}); build it again")
            self.compile([source])
            found = self._given.get(source.key)
        if found is None:
            raise TuningError(self._failed[source.key])
        self.used[source.key] = found
        return found

    def files(self) -> dict[str, bytes]:
        """What an engine file carries of the kernels handed out: an index and the cubins."""
        if not self.used:
            return {}
        index = json.dumps([c.meta() for c in self.used.values()], indent=1).encode()
        return {"kernels/index.json": index} | {f"kernels/{k}.cubin": c.image for k, c in self.used.items()}

    def compile(self, sources: Iterable[KernelSource], done: Callable[[int, int], None] | None = None) -> None:
        """Compile what is missing, one worker process a CPU; failures are remembered. `done(i, n)` after each."""
        wanted = {s.key: s for s in sources if s.key not in self._given and s.key not in self._failed}
        missing = [s for s in wanted.values() if self._cached(s.key) is None]
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        todo: queue.SimpleQueue[KernelSource] = queue.SimpleQueue()
        for source in missing:
            todo.put(source)
        results: queue.SimpleQueue[tuple[KernelSource, Cubin | str]] = queue.SimpleQueue()
        count = min(num_physical_threads(), MAX_WORKERS, len(missing))
        stop = threading.Event()
        threads = [threading.Thread(target=self._work, args=(todo, results, stop), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for i in range(len(missing)):
                source, made = results.get()
                if isinstance(made, str):
                    self._failed[source.key] = made
                else:
                    self._keep(made)
                if done is not None:
                    done(i + 1, len(missing))
        finally:
            stop.set()

    def _work(
        self,
        todo: queue.SimpleQueue[KernelSource],
        results: queue.SimpleQueue[tuple[KernelSource, Cubin | str]],
        stop: threading.Event,
    ) -> None:
        worker: _Worker | None = None
        while not stop.is_set():
            try:
                source = todo.get_nowait()
            except queue.Empty:
                break
            made: Cubin | str
            try:
                worker = worker or _Worker(self._folder)
                made = worker.compile(source)
            except (TuningError, OSError) as exc:
                made = str(exc)
            except TimeoutError:
                made = f"compiling {source.name} took more than {COMPILE_SECONDS:.0f} s"
            if worker is not None and not worker.alive:
                worker = None
            results.put((source, made))
        if worker is not None:
            worker.close()

    def _keep(self, cubin: Cubin) -> None:
        self._given[cubin.key] = cubin
        for suffix, data in ((".cubin", cubin.image), (".json", json.dumps(cubin.meta()).encode())):
            scratch = self._folder / f"{cubin.key}{suffix}.{os.getpid()}"
            with contextlib.suppress(OSError):
                scratch.write_bytes(data)
                os.replace(scratch, self._folder / f"{cubin.key}{suffix}")

    def _cached(self, key: str) -> Cubin | None:
        path = self._folder / f"{key}.json"
        if not path.exists():
            return None
        try:
            cubin = Cubin.from_meta(json.loads(path.read_text()), path.with_suffix(".cubin").read_bytes())
        except (OSError, ValueError, TypeError, KeyError):
            return None
        self._given[key] = cubin
        return cubin


class _Worker:
    """One compiling process; dies with its pipe."""

    def __init__(self, folder: Path) -> None:
        module = "venturi.backends.cuda.codegen.compile"
        root = str(Path(__file__).resolve().parents[3])
        paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"},
        )  # fmt: skip
        self._rest = b""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def compile(self, source: KernelSource) -> Cubin:
        """Raises TuningError with the compiler's reason, TimeoutError (the process is killed then)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(source.to_json()).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._line())
        except TimeoutError:
            self._process.kill()
            raise
        except (OSError, ValueError) as exc:
            self._process.kill()
            raise TuningError(f"the compiler died on {source.name}: {exc}") from exc
        if "error" in answer:
            raise TuningError(answer["error"])
        return Cubin.from_meta(answer["meta"], bytes.fromhex(answer["image"]))

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        handle, end = self._process.stdout.fileno(), time.monotonic() + COMPILE_SECONDS
        while b"\n" not in self._rest:
            if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            chunk = os.read(handle, 1 << 20)
            if not chunk:
                raise OSError("it ended without an answer")
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()


def kernels_of_engine(read: Callable[[str], bytes], index: object) -> dict[str, Cubin]:
    """Cubins from an engine's `kernels/index.json`. Raises EngineError when it is damaged."""
    try:
        if not isinstance(index, list):
            raise TypeError(f"a list is expected, got {type(index).__name__}")
        return {m["key"]: Cubin.from_meta(m, read(f"kernels/{m['key']}.cubin")) for m in index}
    except VenturiError:
        raise
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"kernels/index.json is damaged: {type(exc).__name__} {exc}") from exc
