"""The results as one HTML page: throughput over latency, the frontier, every measurement."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from venturi.serve.analyze.search import Result, frontier

_WIDTH, _HEIGHT, _EDGE = 760, 380, 50
_COLOURS = ("#2b5fd9", "#d9772b", "#1d8a4e", "#b02bd9", "#c23b3b", "#0f8a96", "#8a7a0f", "#5b5f6b")


def html(model: str, results: Sequence[Result], chosen: Result | None, budget_us: float | None, measure: str) -> str:
    """`measure` names the latency that was compared."""
    rows = "".join(
        f"<tr{' class=chosen' if r == chosen else ''}><td>{escape(r.variant.label)}<td>{r.concurrency}"
        f"<td>{r.infer_per_s:.1f}<td>{r.latency_us / 1e3:.2f}<td>{r.mean_us / 1e3:.2f}<td>{r.rows_a_batch:.2f}</tr>"
        for r in results
    )
    said = (
        "nothing is within the budget"
        if chosen is None
        else (
            f"best: {escape(chosen.variant.label)} at concurrency {chosen.concurrency}: "
            f"{chosen.infer_per_s:.1f} inferences/s, {measure} {chosen.latency_us / 1e3:.2f} ms"
        )
    )
    limit = "" if budget_us is None else f" Budget: {measure} {budget_us / 1e3:g} ms."
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(model)}</title>
<style>body{{font:14px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2433}}
table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;border-bottom:1px solid #dfe3ec;text-align:right}}
td:first-child,th:first-child{{text-align:left}}.chosen{{font-weight:600;background:#eef3ff}}</style>
<h1>{escape(model)}</h1><p>{said}.{limit}</p>{_chart(results, chosen, measure)}
<table><tr><th>configuration<th>concurrency<th>inferences/s<th>{escape(measure)} ms<th>mean ms<th>rows a batch</tr>
{rows}</table>
</html>
"""


def _chart(results: Sequence[Result], chosen: Result | None, measure: str) -> str:
    """One line a variant, a dot a concurrency; the frontier dashed."""
    if not results:
        return ""
    right, top = max(r.latency_us for r in results) * 1.05, max(r.infer_per_s for r in results) * 1.05

    def at(result: Result) -> tuple[float, float]:
        x = _EDGE + (_WIDTH - 2 * _EDGE) * result.latency_us / right
        return x, _HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * result.infer_per_s / top

    def line(points: Sequence[Result], colour: str, dash: str = "") -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'

    parts = [line(frontier(results), "#9aa3b5", ' stroke-dasharray="4 4"')]
    for i, variant in enumerate(dict.fromkeys(r.variant for r in results)):
        own, colour = [r for r in results if r.variant == variant], _COLOURS[i % len(_COLOURS)]
        parts.append(line(own, colour))
        for result in own:
            x, y = at(result)
            title = f"{variant.label}, concurrency {result.concurrency}"
            size = 7 if result == chosen else 3.5
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"><title>{escape(title)}</title></circle>'
            )
    axis = f'<path d="M{_EDGE},{_EDGE}V{_HEIGHT - _EDGE}H{_WIDTH - _EDGE}" fill="none" stroke="#6b7487"/>'
    texts = (
        f'<text x="{_WIDTH - _EDGE}" y="{_HEIGHT - 18}" text-anchor="end">'
        f"{escape(measure)}, up to {right / 1e3:.1f} ms</text>"
        f'<text x="{_EDGE}" y="{_EDGE - 14}">inferences/s, up to {top:.0f}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" fill="#6b7487">{axis}{"".join(parts)}{texts}</svg>'
