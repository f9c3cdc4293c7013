"""Machine code from LLVM IR, kept per user: a second process loads objects instead of compiling them.

Objects are named by a hash of what they compute, of the generator's source, of LLVM's version and of the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

from venturi.backends.cpu.codegen.isa import Isa
from venturi.core.fingerprint import source_hash
from venturi.core.folders import cache_folder

# The generators write loops and vectors as they want them: only the clutter is left to clean. LLVM's own -O2 list takes
# five times as long and gives the same code.
PASSES = (
    "instruction_combine", "simplify_cfg", "loop_simplify", "loop_rotate", "instruction_combine", "new_gvn",
    "simplify_cfg",
)  # fmt: skip


class Jit:
    """Thread-safe. `compiled` and `loaded` count kernels made here and kernels found on disk."""

    def __init__(self, isa: Isa, folder: Path) -> None:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        self._isa, self._folder = isa, folder
        self._salt = repr((isa, llvm.llvm_version_info, source_hash("backends/cpu/codegen"), PASSES))
        self._lock = threading.Lock()
        self._jit = llvm.create_lljit_compiler()
        self._live: dict[str, tuple[Any, int]] = {}
        self.compiled = self.loaded = 0

    def address(self, spec: str, emit: Callable[[], str], symbols: Mapping[str, int] | None = None) -> int:
        """Where the function `kernel` that computes `spec` lies; `emit` writes its IR if it is nowhere yet.

        `symbols` are addresses of what it calls, beyond what the process itself exports."""
        key = hashlib.sha256(f"{self._salt}\n{spec}".encode()).hexdigest()[:40]
        with self._lock:
            if key in self._live:
                return self._live[key][1]
        path = self._folder / f"{key}.o"
        image = _read(path)
        if image is None:
            image = compile_object(self._isa, emit())
            _write(path, image)
            self.compiled += 1
        else:
            self.loaded += 1
        with self._lock:
            if key not in self._live:
                builder = llvm.JITLibraryBuilder().add_object_img(image).add_current_process().export_symbol("kernel")
                for name, where in (symbols or {}).items():
                    builder.import_symbol(name, where)
                library = builder.link(self._jit, key)
                self._live[key] = (library, library["kernel"])
            return self._live[key][1]


def target_machine(isa: Isa) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(isa.triple)
    return target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=3, reloc="pic", codemodel="default")


def compile_object(isa: Isa, text: str) -> bytes:
    """An object file from IR. Raises RuntimeError when the IR is wrong."""
    module, machine = optimized(isa, text)
    return bytes(machine.emit_object(module))


def optimized(isa: Isa, text: str) -> tuple[Any, Any]:
    """(module, target machine) after LLVM's passes."""
    machine = target_machine(isa)
    module = llvm.parse_assembly(text)
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    manager = llvm.create_new_module_pass_manager()
    for name in PASSES:
        getattr(manager, f"add_{name}_pass")()
    manager.run(module, builder)
    return module, machine


def _read(path: Path) -> bytes | None:
    """The object behind its checksum; None where there is none, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _write(path: Path, image: bytes) -> None:
    scratch = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(hashlib.sha256(image).digest() + image)
        os.replace(scratch, path)


_JITS: dict[tuple[Isa, Path], Jit] = {}
_JITS_LOCK = threading.Lock()


def host_jit(isa: Isa) -> Jit:
    """The process's own. It lives as long as the process: its code may be running."""
    key = (isa, cache_folder() / "cpu")
    with _JITS_LOCK:
        if key not in _JITS:
            _JITS[key] = Jit(*key)
        return _JITS[key]
