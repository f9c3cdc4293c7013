"""Builds every architecture of the zoo and compares it with torch eager. Run: make zoo"""

from __future__ import annotations

import logging

from rich.console import Console
from rich.table import Table

from benchmarks.report import save
from tests.e2e.checks import check_entry
from tests.e2e.zoo import ZOO


def main() -> None:
    logging.disable(logging.WARNING)
    table = Table("architecture", "export s", "build s", "steps", "attentions", "max error")
    rows = []
    for entry in ZOO:
        r = check_entry(entry, opt_level=3)
        table.add_row(
            r.name, f"{r.export_s:.1f}", f"{r.build_s:.2f}", str(r.steps), str(r.attentions), f"{r.error:.1e}"
        )
        rows.append(vars(r))
    Console().print(table)
    print(save("zoo", rows))


if __name__ == "__main__":
    main()
