"""The plot of the `auto` suite: hybrid / best peer per workload, cold and warm.

Usage: ``python benchmarks/plot.py benchmarks/results/NAME.json`` draws it again, next to the JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compare import COLD, WARM, Row, rows_of

#: Colours that hold on white and on black; no background, and grey text that can be read on both.
WARM_COLOUR, COLD_COLOUR, INK = "#e8590c", "#4c8fd6", "#808080"

TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8, 16, 32)


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw ``document`` into ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "joblib_backends"  # the same document gives the same file
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = sorted((row for row in rows_of(document) if row.against_best(WARM)), key=_warm_ratio, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.32 * len(rows)))
    for offset, when, colour in ((-0.2, WARM, WARM_COLOUR), (0.2, COLD, COLD_COLOUR)):
        ratios = [row.against_best(when) or 1.0 for row in rows]
        # Bars grow from 1.0, to the left where hybrid is faster: on a log scale equal factors are equal lengths.
        axes.barh(
            [position + offset for position in range(len(rows))],
            [ratio - 1.0 for ratio in ratios],
            height=0.38,
            left=1.0,
            color=colour,
            label=when,
        )
    axes.axvline(1.0, color=INK, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(rows)), [row.name + (" *" if row.is_small else "") for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("time of hybrid / time of the fastest peer (left of 1: hybrid is faster)", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color=INK, alpha=0.25)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(loc="lower right", frameon=False, labelcolor=INK)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _warm_ratio(row: Row) -> float:
    return row.against_best(WARM) or 1.0


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".svg"))
