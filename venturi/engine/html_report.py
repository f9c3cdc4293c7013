"""One self-contained HTML page about an engine: totals, time by layer and operator as bars, every candidate."""

from __future__ import annotations

import html
from collections import defaultdict
from pathlib import Path
from typing import Any

from venturi.engine.inspector import Layer, Report

_STYLE = """
body{font:14px system-ui,sans-serif;margin:2em;max-width:75em;color:#1b2733}
table{border-collapse:collapse;width:100%}th,td{padding:.25em .6em;text-align:left;border-bottom:1px solid #e3e8ee}
td.n{text-align:right;font-variant-numeric:tabular-nums}.bar{background:#2f7ed8;height:.9em;border-radius:2px}
.w{width:30%}details summary{cursor:pointer}.muted{color:#6b7a89}
"""


def write_html(path: str | Path, report: Report, manifest: dict[str, Any]) -> None:
    """Write the page; no script, no network."""
    Path(path).write_text(render(report, manifest), encoding="utf-8")


def render(report: Report, manifest: dict[str, Any]) -> str:
    by_op: dict[str, float] = defaultdict(float)
    for layer in report.layers:
        by_op["+".join(layer.ops)] += layer.time_us or 0.0
    slowest = max((t.time_us or 0.0 for t in report.layers), default=0.0)
    ops = sorted(by_op.items(), key=lambda x: -x[1])[:20]
    top = ops[0][1] if ops else 0.0
    interface = "".join(
        f"<tr><td>{kind}</td><td>{_e(s['name'])}</td><td>{_e(s['dtype'])}</td><td>{_e(s['shape'])}</td></tr>"
        for kind, specs in (("input", report.inputs), ("output", report.outputs))
        for s in specs
    )
    built_on = f"{manifest.get('cpu', '')}, venturi {manifest.get('venturi', '')}"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>venturi engine</title><style>{_STYLE}</style>
<h1>{len(report.layers)} layers, {report.total_us / 1e3:.3f} ms</h1>
<p class="muted">{_e(report.target)}, precision {_e(report.precision)}, {_e(built_on)}</p>
<h2>Interface</h2><table>{interface}</table>
<h2>Time by operators</h2><table>{"".join(_bar(n, t, top) for n, t in ops)}</table>
<h2>Layers</h2><table><tr><th>#<th>layer<th>operators<th>tactic<th>us<th>GFLOP/s<th>GB/s<th class="w"></tr>
{"".join(_layer(i, x, slowest) for i, x in enumerate(report.layers))}</table></html>"""


def _e(value: Any) -> str:
    return html.escape(str(value))


def _bar(name: str, time_us: float, top: float) -> str:
    width = 100 * time_us / top if top else 0
    bar = f'<div class="bar" style="width:{width:.1f}%"></div>'
    return f'<tr><td>{_e(name)}</td><td class="n">{time_us:.1f} us</td><td class="w">{bar}</td></tr>'


def _layer(index: int, layer: Layer, slowest: float) -> str:
    width = 100 * (layer.time_us or 0.0) / slowest if slowest else 0
    tried = "".join(
        f"<li>{_e(c['tactic'])}: {_e(c['reason']) if c['median_us'] is None else str(c['median_us']) + ' us'}</li>"
        for c in layer.candidates
    )
    time = "-" if layer.time_us is None else f"{layer.time_us:.1f}"
    rates = "".join(f"<td class='n'>{'-' if x is None else f'{x:.0f}'}</td>" for x in (layer.gflops, layer.gbytes))
    return (
        f"<tr><td class='n'>{index}</td><td><details><summary>{_e(layer.name)}</summary>"
        f"from {_e(', '.join(layer.sources))}"
        f"<ul>{tried}</ul></details></td><td>{_e('+'.join(layer.ops))}</td><td>{_e(layer.tactic)}</td>"
        f"<td class='n'>{time}</td>{rates}"
        f"<td class='w'><div class='bar' style='width:{width:.1f}%'></div></td></tr>"
    )
