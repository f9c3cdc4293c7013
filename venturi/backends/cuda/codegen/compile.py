"""Compiles Triton and Gluon source to cubins ahead of time; needs no GPU. Run as a module it serves requests on stdin.

Protocol of the worker: one KernelSource as JSON a line in; one line out with {"meta", "image" (hex)} or {"error"}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from venturi.backends.cuda.kernel import Cubin, KernelSource, Parameter
from venturi.core.errors import TuningError

MAX_SHARED = 232448


def compile_source(source: KernelSource, folder: Path) -> Cubin:
    """Writes the text under `folder` (Triton reads source files) and compiles it. Raises TuningError."""
    made = lower(source, folder)
    meta = made.metadata
    shared = max(meta.shared, source.peer_shared)
    if shared > MAX_SHARED:
        raise TuningError(f"{shared} bytes of shared memory, a block has {MAX_SHARED}")
    if meta.global_scratch_size:
        raise TuningError(f"{source.name} wants global scratch memory, which the launcher does not give")
    registers, spills = _resources(made.asm["cubin"])
    parameters = _parameters(source, meta.tensordesc_meta)
    declared = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0].count(".param")
    if declared != len(parameters):
        raise TuningError(f"{source.name}: the cubin takes {declared} parameters, expected {len(parameters)}")
    return Cubin(
        source.key, meta.name, made.asm["cubin"], meta.num_warps, shared, parameters, source.overlaps,
        registers, spills, _compiler(), source.cluster,
    )  # fmt: skip


def _compiler() -> str:
    import triton

    return f"triton {triton.__version__}"


def lower(source: KernelSource, folder: Path) -> Any:
    """Triton's own result, with the text of every stage in `asm`. Raises TuningError."""
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource
    except ImportError as exc:
        raise TuningError(f"Triton is needed to build for CUDA: {exc}; pip install 'venturi[cuda]'") from exc

    path = folder / f"{source.name}_{source.key}.py"
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(source.text)
        os.replace(scratch, path)
    fn = getattr(_module(path), source.name)
    constants = dict(source.constants)
    names = [n for n, _ in source.signature]
    if list(fn.arg_names) != names:
        raise TuningError(f"kernel {source.name} takes {list(fn.arg_names)}, the signature says {names}")
    language = GluonASTSource if fn.is_gluon() else ASTSource
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in source.divisible}
    try:
        return triton.compile(
            language(fn=fn, signature=dict(source.signature), constexprs=constants, attrs=attrs),
            target=GPUTarget("cuda", source.arch, 32),
            options={"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True},
        )
    except Exception as exc:  # Triton raises its own, its passes' and plain errors alike
        raise TuningError(f"Triton cannot compile {source.name}: {_reason(exc)}") from exc


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reason(exc: BaseException) -> str:
    lines = [line for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[-1] if lines else ''}"[:300]


def _parameters(source: KernelSource, descriptors: Any) -> tuple[Parameter, ...]:
    """What the entry takes: constants vanish, a descriptor becomes a map, its shape and its strides."""
    found: list[Parameter] = []
    described = iter(descriptors or ())
    for name, kind in source.signature:
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            meta = next(described)
            block = tuple(meta["block_size"])
            found.append(Parameter(name, "tmap", block, meta["swizzle"], meta["elem_type"], meta["elem_size"]))
            found += [Parameter(f"{name}.shape{i}", "i32") for i in range(len(block))]
            found += [Parameter(f"{name}.stride{i}", "i64") for i in range(len(block))]
        else:
            found.append(Parameter(name, "ptr" if kind[0] == "*" else kind))
    return (*found, Parameter("global_scratch", "ptr"), Parameter("profile_scratch", "ptr"))


def _resources(image: bytes) -> tuple[int, int]:
    """(registers, stack bytes) as cuobjdump reports them; zeros when the tool is not there."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return 0, 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, timeout=30).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return int(registers[1]) if registers else 0, int(stack[1]) if stack else 0


def serve() -> None:
    """The worker's loop: until stdin ends."""
    folder = Path(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            made = compile_source(KernelSource.from_json(json.loads(line)), folder)
            answer: dict[str, Any] = {"meta": made.meta(), "image": made.image.hex()}
        except TuningError as exc:
            answer = {"error": str(exc)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    serve()
