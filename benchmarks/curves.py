"""From which length of tasks on is which tier the cheapest, as the planner predicts it, and how well does it predict?

The planner's own cost model is asked for the seconds of a call on each tier, for tasks from 1 µs to 10 s; nothing is
run. Its constants were measured by ``run.py --suite calls`` and ``workers.py``. Beside that stands what it predicted,
and what was measured, in the saved run of the auto suite (``results/auto.json``).

Usage: ``python benchmarks/curves.py [--save]``; ``--save`` writes ``results/curves.md``, ``curves.svg`` and
``curves-predicted.svg``, else the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from plot import INK

from joblib_backends.experience import Experience
from joblib_backends.planner import _COSTS, CallPlanner
from joblib_backends.rules import Facts

RESULTS = Path(__file__).resolve().parent / "results"

N_TASKS = 200

#: Seconds that workers with scikit-learn need to start, as the planner expects it before it has seen one start.
STARTUP_S = 1.2

LENGTHS_S = np.geomspace(1e-6, 10.0, 701)
DRAWN_S = LENGTHS_S[::4]
COLOURS = {"inline": "#808080", "threads": "#2f9e44", "processes": "#4c8fd6", "processes, cold": "#4c8fd6"}

#: What is asked of the planner: whether threads share one GIL, and bytes of the data of each task.
KINDS = {
    "tasks release the GIL": (False, 0),
    "tasks hold the GIL": (True, 0),
    "they release it, 100 MB of data": (False, 100_000_000),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or save the tables, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write results/curves.md and two .svg")
    options = parser.parse_args(arguments)
    calls = predicted_and_measured(json.loads((RESULTS / "auto.json").read_text()))
    text = report(calls)
    if not options.save:
        print(text)
        return 0
    (RESULTS / "curves.md").write_text(text)
    draw_curves(RESULTS / "curves.svg")
    draw_predictions(calls, RESULTS / "curves-predicted.svg")
    return 0


def predictor(cores: int, *, holds_gil: bool, nbytes: int) -> Callable[[str, float], float]:
    """Return what predicts the seconds of a call on a tier, from the seconds of one of its tasks alone."""
    facts = Facts(trusted_on_threads=True, n_jobs=cores, cores=cores)
    # One GIL for all: a task on a thread takes as long as all that run with it, and computes for one part of that.
    slower = float(cores if holds_gil else 1)
    known = Experience(1.0, N_TASKS, {"threads": slower}, {"threads": 1 / slower}) if holds_gil else None
    planner = CallPlanner(facts, known, nbytes)

    def seconds(tier: str, task_s: float) -> float:
        if tier == "processes, cold":
            return STARTUP_S + seconds("processes", task_s)
        return planner._seconds_on(tier, task_s, N_TASKS)

    return seconds


def crossing(predict: Callable[[str, float], float], tier: str, others: Sequence[str]) -> float | None:
    """Return the length of tasks from which on ``tier`` is the cheapest, in seconds; None if it never is for long."""
    wins = [all(predict(tier, task_s) < predict(other, task_s) for other in others) for task_s in LENGTHS_S]
    if not wins[-1]:
        return None
    first = next(position for position in range(len(wins)) if all(wins[position:]))
    return float(LENGTHS_S[first])


def predicted_and_measured(document: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (workload, predicted, measured) of the last warm call of each workload that was predicted, in seconds."""
    found = []
    for name, workload in document["workloads"].items():
        reports = [report for report in workload["rows"]["hybrid"]["reports"] if report]
        last = reports[-1] if reports else {}
        if last.get("predicted_seconds"):
            found.append((name, last["predicted_seconds"], last["seconds"]))
    return found


def report(calls: Sequence[tuple[str, float, float]]) -> str:
    """Return the tables."""
    lines = [
        "## curves",
        "",
        f"What the planner predicts for a call of {N_TASKS} equal tasks, by `python benchmarks/curves.py --save`. "
        f"*Cold*: the call waits {STARTUP_S:g} s for its workers. Nothing was run for the first table.",
        "",
        "### From which length of tasks on is a tier cheaper?",
        "",
        "| cores | kind | threads than inline | processes than inline | processes, cold, than inline "
        "| processes than threads |",
        "|---|---|---:|---:|---:|---:|",
    ]
    pairs = (("threads", "inline"), ("processes", "inline"), ("processes, cold", "inline"), ("processes", "threads"))
    for cores in (2, 16):
        for kind, (holds_gil, nbytes) in KINDS.items():
            predict = predictor(cores, holds_gil=holds_gil, nbytes=nbytes)
            cells = (_length(crossing(predict, one, [other])) for one, other in pairs)
            lines.append(f"| {cores} | {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        "### Constants",
        "",
        "What a tier costs in the parent: once per call, per batch, and per task whatever else runs; how long a batch "
        "should run.",
        "",
        "| tier | call | batch | task | batch runs |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {tier} | {' | '.join(map(_cost, (cost.call_s, cost.batch_s, cost.task_s, cost.batch_runs_s)))} |"
            for tier, cost in _COSTS.items()
        ),
    ]
    off = [abs(math.log(measured / predicted)) for _, predicted, measured in calls if measured >= 0.1]
    within = sum(value <= math.log(1.1) for value in off)
    lines += [
        "",
        "### Predicted and measured",
        "",
        f"The last warm call of each workload in `auto.json`. Of {len(off)} calls of 0.1 s or more, {within} took what "
        f"was predicted to within 10 %; the median is off by {100 * (math.exp(median(off)) - 1):.1f} %, the worst by a "
        f"factor of {math.exp(max(off)):.2f}.",
        "",
        "| workload | predicted | measured | measured / predicted |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {_length(p)} | {_length(m)} | {m / p:.2f} |" for name, p, m in calls),
        "",
    ]
    return "\n".join(lines)


def draw_curves(path: Path) -> None:
    """Draw the time of a call on each tier over that of a plain loop, by the length of a task."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(KINDS), figsize=(11, 3.6), sharey=True)
    for axes, (kind, (holds_gil, nbytes)) in zip(panels, KINDS.items(), strict=True):
        predict = predictor(4, holds_gil=holds_gil, nbytes=nbytes)
        for tier, colour in COLOURS.items():
            ratios = [predict(tier, task_s) / (N_TASKS * task_s) for task_s in DRAWN_S]
            axes.plot(DRAWN_S, ratios, color=colour, label=tier, linestyle=":" if "cold" in tier else "-")
        axes.axhline(0.25, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", ylim=(0.18, 8), xlim=(1e-5, 10))
        axes.set_title(kind, color=INK, fontsize=10)
        _style(axes, plt)
        axes.set_xticks([1e-5, 1e-3, 0.1, 10], ["10 µs", "1 ms", "0.1 s", "10 s"])
        axes.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        axes.yaxis.set_minor_locator(plt.NullLocator())
    panels[0].set_ylabel("call / plain loop", color=INK)
    panels[1].set_xlabel("time of one task", color=INK)
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=9)
    _save(figure, path, plt)


def draw_predictions(calls: Sequence[tuple[str, float, float]], path: Path) -> None:
    """Draw what was measured over what was predicted."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5.2, 4.4))
    _, predicted, measured = zip(*calls, strict=True)
    ends = (3e-3, 2.0)
    axes.plot(ends, ends, color=INK, linewidth=0.8)
    axes.scatter(predicted, measured, s=18, color="#e8590c")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("measured", color=INK)
    _style(axes, plt)
    axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, position: _length(value)))
    _save(figure, path, plt)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "joblib_backends"  # the same numbers give the same file
    from matplotlib import pyplot

    return pyplot


def _style(axes: Any, plt: Any) -> None:
    axes.tick_params(colors=INK, which="both", length=0)
    axes.grid(color=INK, alpha=0.25)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, position: _length(value)))


def _save(figure: Any, path: Path, plt: Any) -> None:
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def _cost(seconds: float) -> str:
    return _length(seconds) if seconds else "0"


def _length(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    if seconds <= LENGTHS_S[0]:
        return "always"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


if __name__ == "__main__":
    sys.exit(main())
