"""At what size of cluster, tasks and data does which part become the limit? From measured constants, to 10,000 workers.

The constants are those of ``results/cluster-size.json`` (``cluster_size.py``); what is simulated of a cluster, and what
is not, says ``cluster_model.py``. Its predictions for the machine that measured them stand beside what was measured
there. The answer is the same each time.

Usage: ``python benchmarks/cluster_simulation.py [--save]``. ``--save`` writes ``results/cluster-simulation.json``,
``.md`` and ``.svg``; ``plot`` in the place of the options draws and writes the last two again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from cluster_model import Cluster, Costs, Load, arrivals, limit_of, shortest_task_s, simulate
from cluster_size import RESULTS as MEASURED
from cluster_size import efficiency
from joblib import Parallel, delayed, parallel_config
from layout import markdown_table, seconds
from machine import machine_line

import joblib_backends  # noqa: F401  registers the backend

RESULTS: Final = MEASURED.with_name("cluster-simulation.json")

WORKERS: Final = (10, 30, 100, 300, 1_000, 3_000, 10_000)
TASK_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
HOSTS: Final = (1, 2, 4, 16, 64, 125, 250, 625, 1_250)
NBYTES: Final = (1e9, 1e10, 1e11)
GBIT_PER_S: Final = (1.0, 10.0, 25.0)
LATENCIES_S: Final = (1e-4, 1e-3, 1e-2, 5e-2)

#: Of a call: enough that its start and its end are no matter, few enough that somebody would start it.
TASKS_PER_WORKER: Final = 20

#: The workers' share of time that is asked for.
WANTED: Final = 0.8

#: Workers and their tasks, where a round trip and data are varied.
_EXAMPLE: Final = (1_000, 1.0)

#: The measured cluster from whose constants the measured rates of the others are predicted.
_REFERENCE_WORKERS: Final = 100

_MIB: Final = 1 << 20


# ---- the constants


def rows_of(document: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """Return the measured rows in which all of that holds."""
    return [row for row in document["rows"] if all(row.get(name) == value for name, value in wanted.items())]


def short_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return our tier's rows with tasks that take no time, the smallest cluster first."""
    found = rows_of(document, what="calls", way="hybrid", task_s=0.0)
    return sorted(found, key=lambda row: row["n_workers"])


def costs_at(document: dict[str, Any], n_workers: int) -> Costs:
    """Return the constants that the cluster tells whose size is nearest; of many workers, the largest."""
    rows = short_rows(document)
    return costs_in(document, min(rows, key=lambda row: abs(math.log(row["n_workers"] / n_workers))))


def costs_in(document: dict[str, Any], row: dict[str, Any]) -> Costs:
    """Return the constants that a row tells."""
    [choice], [transfer] = rows_of(document, what="choice"), rows_of(document, what="transfer")
    choice_s, idle = choice["choice_s"] / choice["n_workers"], row["idle_cpu_share"]
    own = {name: one["cpu_ms_per_task"] / 1e3 for name, one in row["processes"].items()}
    # What each would have spent without any task is none of its cost.
    alone_s = row["wall_s"] / row["n_tasks"]
    n_idle = 0 if row["task_s"] else row["n_workers"]
    scheduler_s = own["scheduler"] - idle["scheduler"] * alone_s - choice_s * n_idle
    worker_s = own["workers"] - idle["workers"] * alone_s
    waits_s = max(0.0, row["round_trip_s"] - own["client"] - scheduler_s - worker_s)
    return Costs(
        client_s=own["client"],
        scheduler_s=scheduler_s,
        worker_s=worker_s,
        choice_s=choice_s,
        heartbeat_s=idle["scheduler"] / Cluster(row["n_workers"]).heartbeats_per_s,
        waits_s=waits_s,
        by_scheduler_per_s=transfer["by_scheduler_per_s"],
        worker_to_worker_per_s=transfer["worker_to_worker_per_s"],
    )


def costs_of_a_cluster(document: dict[str, Any]) -> Costs:
    """Return the constants for clusters beyond what was measured: those of the largest, a worker's from the smallest.

    Hundreds of workers in one process hinder each other, which those on cores of their own do not.
    """
    rows = short_rows(document)
    worker_s = costs_at(document, rows[0]["n_workers"]).worker_s
    return replace(costs_at(document, rows[-1]["n_workers"]), worker_s=worker_s)


# ---- what is computed


def compute(measured: dict[str, Any]) -> dict[str, Any]:
    """Return all that the tables and the plot show."""
    costs = costs_of_a_cluster(measured)
    with parallel_config("hybrid", n_jobs=-1):
        points = Parallel(batch_size=1)(
            # The long ones first: they are what the end waits for.
            delayed(_point)(costs, n_workers, task_s)
            for n_workers in reversed(WORKERS)
            for task_s in TASK_S
        )
        shortest = Parallel(batch_size=1)(
            delayed(_shortest)(costs, n_workers, latency_s)
            for n_workers in reversed(WORKERS)
            for latency_s in (0.5e-3, 50e-3)
        )
    return {
        "machine": measured["machine"],
        "costs": asdict(costs),
        "points": points,
        "shortest": shortest[::-1],
        "data": [_data(costs, *which) for which in _data_cases()],
        "latency": [_with_latency(costs, latency_s, task_s) for task_s in (0.1, 1.0) for latency_s in LATENCIES_S],
        "memory": _memory(measured),
        "validation": _validated(measured),
    }


def _point(costs: Costs, n_workers: int, task_s: float) -> dict[str, Any]:
    limit, outcome = limit_of(costs, Cluster(n_workers), Load(TASKS_PER_WORKER * n_workers, task_s))
    return {"n_workers": n_workers, "task_s": task_s, "limit": limit, **asdict(outcome)}


def _shortest(costs: Costs, n_workers: int, latency_s: float) -> dict[str, Any]:
    cluster = Cluster(n_workers, latency_s=latency_s)
    task_s = shortest_task_s(costs, cluster, per_worker=TASKS_PER_WORKER, efficiency=WANTED)
    limit, outcome = limit_of(costs, cluster, Load(TASKS_PER_WORKER * n_workers, task_s / 2))
    return {
        "n_workers": n_workers,
        "latency_s": latency_s,
        "task_s": task_s,
        "tasks_per_s": outcome.tasks_per_s,
        "limit": limit,
    }


def _data_cases() -> list[tuple[float, float, int]]:
    return [(nbytes, gbit_per_s, hosts) for nbytes in NBYTES for gbit_per_s in GBIT_PER_S for hosts in HOSTS]


def _data(costs: Costs, nbytes: float, gbit_per_s: float, hosts: int) -> dict[str, Any]:
    cluster = Cluster(8 * hosts, gbit_per_s=gbit_per_s)
    at_s = arrivals(costs, cluster, nbytes)
    # A call whose workers are so busy has this much work for each of them.
    work_s = WANTED / (1.0 - WANTED) * sum(at_s) / len(at_s)
    place = {"nbytes": nbytes, "gbit_per_s": gbit_per_s, "hosts": hosts}
    return {**place, "first_s": at_s[0], "last_s": at_s[-1], "work_s": work_s}


def _with_latency(costs: Costs, latency_s: float, task_s: float) -> dict[str, Any]:
    n_workers = _EXAMPLE[0] if task_s == _EXAMPLE[1] else 100
    cluster = Cluster(n_workers, latency_s=latency_s)
    limit, outcome = limit_of(costs, cluster, Load(TASKS_PER_WORKER * n_workers, task_s))
    return {"n_workers": n_workers, "task_s": task_s, "latency_s": latency_s, "limit": limit, **asdict(outcome)}


def _memory(measured: dict[str, Any]) -> dict[str, Any]:
    """Return what a batch in flight takes, from the growth that more workers made, and what is left of each task."""
    small, large = short_rows(measured)[0], short_rows(measured)[-1]
    more = 10 * (large["n_workers"] - small["n_workers"])
    found: dict[str, Any] = {"n_workers": [small["n_workers"], large["n_workers"]]}
    for name in ("client", "scheduler"):
        grown = [row["processes"][name]["peak_mib"] - row["processes"][name]["start_mib"] for row in (small, large)]
        in_flight = max(0.0, (grown[1] - grown[0]) * _MIB / more)
        rest = max(0.0, grown[0] * _MIB - in_flight * 10 * small["n_workers"])
        found[name] = {"bytes_in_flight": in_flight, "bytes_per_task": rest / small["n_tasks"]}
    return found


def _on_this_machine(measured: dict[str, Any], row: dict[str, Any]) -> Cluster:
    busy = sum(row["idle_cpu_share"].values()) + row["others_cpu_share"]
    cores = max(0.5, measured["machine"]["cores"] - busy)
    # Whatever goes over the loopback goes at once.
    return Cluster(row["n_workers"], latency_s=0.0, shared_cores=cores)


def _validated(measured: dict[str, Any]) -> list[dict[str, Any]]:
    reference = costs_at(measured, _REFERENCE_WORKERS)
    lines = []
    for row in rows_of(measured, what="calls", way="hybrid"):
        cluster, load = _on_this_machine(measured, row), Load(row["n_tasks"], row["task_s"])
        by_reference, by_own = (simulate(costs, cluster, load) for costs in (reference, costs_in(measured, row)))
        if row["task_s"]:
            name = f"efficiency, {row['n_workers']} workers, tasks of {seconds(row['task_s'])}"
            found = efficiency(row), by_reference.efficiency, by_own.efficiency
        else:
            name = f"tasks/s, {row['n_workers']} workers, tasks of no length"
            found = row["n_tasks"] / row["wall_s"], by_reference.tasks_per_s, by_own.tasks_per_s
        lines.append({"what": name, **dict(zip(("measured", "predicted", "own"), found, strict=True))})
    return lines


# ---- the report


def report(document: dict[str, Any]) -> str:
    """Return the tables."""
    parts = [
        "## cluster-simulation",
        f"Constants measured on: {machine_line(document['machine'])}",
        f"Links of 10 Gbit/s and round trips of 0.5 ms where nothing else is said, 8 workers of one thread per host, "
        f"{TASKS_PER_WORKER} tasks per worker from half to one and a half times the length that is named. "
        "*Efficiency*: the time of all tasks over that of all workers. *Limit*: the part without which the call would "
        "end soonest.",
        "### Constants",
        markdown_table(("constant", "value"), _cost_lines(document["costs"])),
        "### Predicted and measured",
        "On the machine of the constants, whose cores client, scheduler, workers and whatever else ran share; from the "
        f"constants of {_REFERENCE_WORKERS} workers with tasks of no length, and from the row's own CPU time per task. "
        "Where the first is too good and the second is not, a task has cost more than in the reference: messages that "
        "come one by one cost more than those that come together, all the more of hundreds of workers in one process.",
        markdown_table(("what", "measured", f"from {_REFERENCE_WORKERS}", "from its own"), _validation_lines(document)),
        f"### From which length of tasks on are the workers busy {WANTED:.0%} of the time?",
        markdown_table(
            ("workers", "0.5 ms round trip", "tasks/s", "limit", "50 ms round trip", "tasks/s", "limit"),
            _shortest_lines(document["shortest"]),
        ),
        "Tasks/s and limit: with tasks of half that length.",
        "### Efficiency",
        markdown_table(("workers", *(seconds(each) for each in TASK_S)), _grid_lines(document["points"])),
        "### Round trips",
        markdown_table(
            ("workers", "a task", *(seconds(each) for each in LATENCIES_S)), _latency_lines(document["latency"])
        ),
        "### Data that all tasks need",
        markdown_table(
            ("data", "Gbit/s", *(f"{hosts} hosts" for hosts in HOSTS[1:]), f"work for {WANTED:.0%} at {HOSTS[5]}"),
            _data_lines(document["data"]),
        ),
        "Until the last host has it; the first has it by way of the scheduler. The last column: how long the tasks of "
        "each worker have to last in all for the wait not to matter much.",
        "### Memory",
        markdown_table(
            ("process", "per batch in flight", "per task of the call", "10,000 workers, 1,000,000 tasks"),
            _memory_lines(document["memory"]),
        ),
        f"Of `batch_size=1`, from the growth between {document['memory']['n_workers'][0]} and "
        f"{document['memory']['n_workers'][1]} workers; what each process has from the start is not in it.",
    ]
    return "\n\n".join(parts) + "\n"


_NAMES: Final = {
    "client_s": "client, CPU per task",
    "scheduler_s": "scheduler, CPU per task",
    "worker_s": "worker, CPU per task besides the task",
    "choice_s": "scheduler, CPU per task and idle worker",
    "heartbeat_s": "scheduler, CPU per sign of life of a worker",
    "waits_s": "round trip, besides CPU and network",
    "by_scheduler_per_s": "client to worker, through the scheduler",
    "worker_to_worker_per_s": "worker to worker",
}


def _cost_lines(costs: dict[str, float]) -> list[tuple[str, str]]:
    return [
        (name, f"{costs[key] / 1e6:.0f} MB/s" if key.endswith("per_s") else seconds(costs[key]))
        for key, name in _NAMES.items()
    ]


def _validation_lines(document: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            line["what"],
            *(f"{line[name]:.{0 if line['measured'] > 2 else 2}f}" for name in ("measured", "predicted", "own")),
        )
        for line in document["validation"]
    ]


def _shortest_lines(shortest: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    lines = []
    for n_workers in WORKERS:
        cells = []
        for latency_s in (0.5e-3, 50e-3):
            [one] = [s for s in shortest if s["n_workers"] == n_workers and s["latency_s"] == latency_s]
            cells += [seconds(one["task_s"]), f"{one['tasks_per_s']:.0f}", one["limit"]]
        lines.append((f"{n_workers:,}", *cells))
    return lines


def _grid_lines(points: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    at = {(point["n_workers"], point["task_s"]): point for point in points}
    return [(f"{n_workers:,}", *(_share(at[n_workers, task_s]) for task_s in TASK_S)) for n_workers in WORKERS]


def _share(point: dict[str, Any]) -> str:
    limit = "" if point["limit"] == "workers" else f" {point['limit']}"
    return f"{point['efficiency']:.2f}{limit}"


def _latency_lines(points: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    which = sorted({(point["n_workers"], point["task_s"]) for point in points})
    cells = {place: [_share(p) for p in points if (p["n_workers"], p["task_s"]) == place] for place in which}
    return [(f"{n_workers:,}", seconds(task_s), *cells[n_workers, task_s]) for n_workers, task_s in which]


def _data_lines(cases: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    at = {(case["nbytes"], case["gbit_per_s"], case["hosts"]): case for case in cases}
    return [
        (
            f"{nbytes / 1e9:.0f} GB",
            f"{gbit_per_s:.0f}",
            *(_time(at[nbytes, gbit_per_s, hosts]["last_s"]) for hosts in HOSTS[1:]),
            _time(at[nbytes, gbit_per_s, HOSTS[5]]["work_s"]),
        )
        for nbytes in NBYTES
        for gbit_per_s in GBIT_PER_S
    ]


def _time(value: float) -> str:
    return seconds(value) if value < 120 else f"{value / 60:.0f} min" if value < 7_200 else f"{value / 3_600:.1f} h"


def _memory_lines(memory: dict[str, Any]) -> list[tuple[str, ...]]:
    lines = []
    for name in ("client", "scheduler"):
        one = memory[name]
        whole = (one["bytes_in_flight"] * 100_000 + one["bytes_per_task"] * 1_000_000) / _MIB
        lines.append((name, f"{one['bytes_in_flight']:.0f} B", f"{one['bytes_per_task']:.0f} B", f"{whole:,.0f} MiB"))
    return lines


# ---- the plot

_COLOURS: Final = {
    "workers": "#2f9e44",
    "tail": "#99c79f",
    "scheduler": "#e8590c",
    "client": "#9c36b5",
    "round trips": "#4c8fd6",
    "data": "#f2b705",
}
_INK: Final = "#808080"


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw what limits a call, and when data is everywhere."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "joblib_backends"  # the same document gives the same file
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    for axes in (left, right):
        # First: it sets the limits of the axes anew.
        axes.set_xscale("log")
        axes.set_yscale("log")
    _draw_limits(left, document["points"])
    _draw_data(right, document["data"])
    for axes in (left, right):
        axes.tick_params(colors=_INK, which="both")
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.title.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _draw_limits(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    at = {(point["n_workers"], point["task_s"]): point for point in points}
    for limit, colour in _COLOURS.items():
        mine = [place for place, point in at.items() if point["limit"] == limit]
        if mine:
            axes.scatter(*zip(*mine, strict=True), color=colour, s=150, marker="s", label=limit)
    shares = [[at[n_workers, task_s]["efficiency"] for n_workers in WORKERS] for task_s in TASK_S]
    lines = axes.contour(WORKERS, TASK_S, shares, levels=[0.1, 0.5, 0.8, 0.9], colors=_INK, linewidths=1.2)
    axes.clabel(lines, fmt=lambda level: f"{level:.0%}", fontsize=8)
    axes.set_xlim(WORKERS[0] / 1.6, WORKERS[-1] * 1.6)
    axes.set_ylim(TASK_S[0] / 1.6, TASK_S[-1] * 1.6)
    axes.set_xlabel("workers")
    axes.set_ylabel("length of a task in seconds")
    axes.set_title("what limits a call; lines: how busy the workers are", fontsize=10)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=4, frameon=False, labelcolor=_INK, fontsize=8)


def _draw_data(axes: Any, cases: Sequence[dict[str, Any]]) -> None:
    colours = dict(zip(NBYTES, ("#4c8fd6", "#e8590c", "#9c36b5"), strict=True))
    styles = dict(zip(GBIT_PER_S, (":", "-", "--"), strict=True))
    for nbytes in NBYTES:
        for gbit_per_s in GBIT_PER_S:
            mine = [case for case in cases if (case["nbytes"], case["gbit_per_s"]) == (nbytes, gbit_per_s)]
            label = f"{nbytes / 1e9:.0f} GB, {gbit_per_s:.0f} Gbit/s"
            xs, ys = [case["hosts"] for case in mine], [case["last_s"] for case in mine]
            axes.plot(xs, ys, color=colours[nbytes], linestyle=styles[gbit_per_s], label=label)
    axes.set_xlabel("hosts")
    axes.set_ylabel("seconds until all have the data")
    axes.set_title("data that all tasks need", fontsize=10)
    axes.grid(color=_INK, alpha=0.25)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.4), ncols=3, frameon=False, labelcolor=_INK, fontsize=8)


def _write(document: dict[str, Any]) -> None:
    RESULTS.with_suffix(".md").write_text(report(document), encoding="utf-8")
    plot(document, RESULTS.with_suffix(".svg"))


def main() -> None:
    """Simulate, print, and save if that is asked for."""
    if sys.argv[1:] == ["plot"]:
        _write(json.loads(RESULTS.read_text()))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    document = compute(json.loads(MEASURED.read_text()))
    print(report(document))
    if options.save:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _write(document)


if __name__ == "__main__":
    main()
