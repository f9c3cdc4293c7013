"""The ordered list of passes, and the manager that runs, verifies, times and dumps them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from venturi.core import knobs
from venturi.core.log import logger
from venturi.core.progress import ProgressCallback, report
from venturi.ir.build import subgraphs
from venturi.ir.printer import format_graph
from venturi.ir.region import is_region
from venturi.ir.verify import verify
from venturi.passes import (
    activations,
    attention,
    batch_norm,
    cast_like,
    cast_precision,
    clean,
    cluster,
    constants,
    conv_1d,
    dynamic,
    epilogue,
    flat_heads,
    horizontal,
    identities,
    integer_ops,
    layout,
    linear_rows,
    masks,
    naming,
    norms,
    packed_attention,
    pads,
    quantized,
    scale_shift,
    shapes,
    sink_reshapes,
)
from venturi.passes.rewriting import PassContext

Run = Callable[[ir.Graph, PassContext], None]


@dataclass(frozen=True)
class Pass:
    """`nested`: also runs inside the bodies of If, Loop and Scan."""

    name: str
    run: Run
    nested: bool = True


PIPELINE: tuple[Pass, ...] = (
    Pass("remove-dead", clean.remove_dead),
    Pass("resolve-cast-like", cast_like.run),
    Pass("fold-constants", constants.run),
    Pass("inline-branches", constants.inline_branches),
    Pass("remove-identities", identities.run),
    Pass("integers-as-numbers", integer_ops.run, nested=False),
    Pass("simplify-shapes", shapes.run),
    Pass("merge-duplicates", clean.merge_duplicates),
    Pass("fold-batch-norm", batch_norm.run),
    Pass("fold-scale-shift", scale_shift.run),
    Pass("fold-pads", pads.run),
    Pass("recognize-activations", activations.run),
    Pass("recognize-norms", norms.run),
    Pass("recognize-attention", attention.run, nested=False),
    Pass("fold-constants-2", constants.run),
    Pass("remove-identities-2", identities.run),
    Pass("drop-neutral-masks", masks.run, nested=False),
    Pass("flatten-heads", flat_heads.run, nested=False),
    Pass("linear-on-rows", linear_rows.run, nested=False),
    Pass("rows-as-images", conv_1d.run, nested=False),
    Pass("cast-precision", cast_precision.run, nested=False),
    Pass("sink-reshapes", sink_reshapes.run, nested=False),
    Pass("simplify-casts", shapes.run),
    Pass("remove-identities-3", identities.run),
    Pass("fold-constants-3", constants.run),
    Pass("fuse-horizontal", horizontal.run, nested=False),
    Pass("remove-dead-2", clean.remove_dead),
    Pass("pack-attention", packed_attention.run, nested=False),
    Pass("sign-bytes", quantized.make_signed, nested=False),
    Pass("hoist-quantize", quantized.hoist, nested=False),
    Pass("sink-dequantize", quantized.sink, nested=False),
    Pass("fuse-quantized", quantized.fuse, nested=False),
    Pass("fuse-dynamic", dynamic.run, nested=False),
    Pass("fuse-epilogues", epilogue.run, nested=False),
    Pass("cluster-pointwise", cluster.run, nested=False),
    Pass("remove-dead-3", clean.remove_dead),
    Pass("assign-layout", layout.run, nested=False),
    Pass("stable-names", naming.run, nested=False),
)


def run_pipeline(
    model: ir.Model,
    ctx: PassContext,
    *,
    progress: ProgressCallback | None = None,
    stop_after: str | None = None,
) -> dict[str, float]:
    """Rewrite `model` in place; returns milliseconds by pass. Raises InternalError when a pass breaks the graph."""
    times: dict[str, float] = {}
    level, dump = knobs.VERIFY.get(), knobs.DUMP.get()
    if ctx.fuel < 0:
        ctx.fuel = knobs.FUEL.get()
    for i, item in enumerate(PIPELINE):
        report(progress, "passes", i, len(PIPELINE), item.name)
        start = time.perf_counter()
        ctx.current = item.name
        _apply(item, model.graph, ctx)
        times[item.name] = (time.perf_counter() - start) * 1e3
        if level >= 2:
            verify(model.graph, after=item.name)
        if dump:
            folder = Path(dump)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02d}_{item.name}.txt").write_text(format_graph(model.graph) + "\n")
        if knobs.DEBUG.get() >= 5:
            logger.warning("after %s:\n%s", item.name, format_graph(model.graph))
        if item.name == stop_after:
            break
    if level == 1:
        verify(model.graph, after="the pipeline")
    report(progress, "passes", len(PIPELINE), len(PIPELINE))
    return times


def _apply(item: Pass, graph: ir.Graph, ctx: PassContext) -> None:
    item.run(graph, ctx)
    if item.nested:
        for node in graph:
            if not is_region(node):
                for sub in subgraphs(node):
                    _apply(item, sub, ctx)
