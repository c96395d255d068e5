"""What do shared fits save? Searches on hybrid, on its peers, and in scikit-learn's and dask-ml's own ways to share.

Each measurement is a fresh process: a call to warm up, then the median of the next ones. Rounds go row by row, so that
a slow minute of the machine hits all rows alike. ``mean_test_score`` is compared with the plain loop's, exactly.

The lower bound is the distinct work over the cores: each distinct fit and transform of a prefix and each fit and score
of a last step, run once, one after the other with one thread, plus the refit with all of them.

Usage: ``python benchmarks/sharing.py [--rounds N] [--calls N] [--searches a b ...] [--rows ...] [--save]``, or
``python benchmarks/sharing.py shelf`` for the costs that ``joblib_backends/sharing/task.py`` reckons with. dask-ml is
measured where it is installed. ``--save`` writes ``results/sharing.json`` and ``sharing.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from layout import markdown_table
from machine import describe_machine, load_warning, machine_line
from searches import GROWTH, SEARCHES, Search

RESULTS = Path(__file__).resolve().parent / "results"
LOWER_BOUND = "lower bound"
HYBRID = "hybrid"
OFF = "hybrid, share_fits=False"
DASK_ML = "dask-ml"
MEMORY = "loky, memory="
PEERS = ("loky", "threading", "dask", MEMORY, DASK_ML)
ROWS = (HYBRID, OFF, *PEERS, LOWER_BOUND)

#: Seconds of a first call after which only one more is timed.
SLOW_S = 8.0

#: Calls before those that are timed, on hybrid's rows: ``tier="auto"`` learns from each.
EARLIER_CALLS = 4

#: (search, goal in words, ratio of hybrid to what, at most)
GOALS: tuple[tuple[str, str, float], ...] = (
    ("a: PCA", "loky", 0.5),
    ("a: PCA", DASK_ML, 0.65),
    ("a: PCA", LOWER_BOUND, 1.25),
    ("b: text", "loky", 0.20),
    ("b: text", DASK_ML, 0.9),
    ("c: columns", "loky", 0.5),
    ("d: nothing in common", "best peer", 1.05),
    ("e: one cheap step", "best peer", 1.05),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and save them if asked to."""
    parser = argparse.ArgumentParser(description="Time searches whose candidates share steps.")
    parser.add_argument("what", nargs="?", choices=["searches", "shelf"], default="searches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3, help="warm calls of each process (default: %(default)s)")
    parser.add_argument("--searches", nargs="+", default=[name[0] for name in SEARCHES], help="their first letters")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("SEARCH", "ROW", "LAST"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(_measure(*options.child, n_calls=options.calls)))
        return 0
    if options.what == "shelf":
        _print_costs_of_the_shelf()
        return 0
    rows = [row for row in options.rows if row != DASK_ML or importlib.util.find_spec("dask_ml")]
    names = [name for name in SEARCHES if name[0] in options.searches]
    machine = describe_machine()
    measured = _measure_all(names, rows, options.rounds, options.calls)
    document = {"machine": machine, "rounds": options.rounds, "calls": options.calls, **measured}
    report = _report(document)
    print(report)
    if options.save:
        RESULTS.joinpath("sharing.json").write_text(json.dumps(document, indent=1))
        RESULTS.joinpath("sharing.md").write_text(report)
    return int(any("error" in one for times in document["times"].values() for one in times.values()))


def _measure_all(names: list[str], rows: list[str], rounds: int, n_calls: int) -> dict[str, Any]:
    times: dict[str, dict[str, Any]] = {name: {row: {"seconds": []} for row in rows} for name in names}
    growth: dict[str, dict[str, list[float]]] = {name: {"half": [], "all": []} for name in GROWTH if name in names}
    for turn in range(rounds):
        for name in names:
            scores: Any = None
            for row in (*rows[turn % len(rows) :], *rows[: turn % len(rows)]):
                found = _in_fresh_process(name, row, 0, n_calls)
                one = times[name][row]
                if "error" in found:
                    one["error"] = found["error"]
                    continue
                one["seconds"].append(found["seconds"])
                one["report"] = found.get("report", "")
                scores = scores or found.get("scores")
                if not _agree(found.get("scores"), scores, exactly=row != DASK_ML):
                    one["error"] = f"other scores: {found['scores'][:3]} instead of {scores[:3]}"
                print(f"{name:<22} {row:<26} {found['seconds']:.3f} s", file=sys.stderr, flush=True)
        for name in growth:
            for half, n_last in (("half", GROWTH[name][1] // 2), ("all", GROWTH[name][1])):
                growth[name][half].append(_in_fresh_process(name, HYBRID, n_last, n_calls)["seconds"])
                growth[name].setdefault(f"bound {half}", []).append(
                    _in_fresh_process(name, LOWER_BOUND, n_last, n_calls)["seconds"]
                )
    return {"times": times, "growth": growth}


def _agree(scores: list[float] | None, expected: list[float] | None, *, exactly: bool) -> bool:
    """Return whether scores are as expected; dask-ml's are means over samples, and not over folds."""
    if scores is None or expected is None or exactly:
        return scores is None or scores == expected
    return all(abs(one - other) < 1e-3 for one, other in zip(scores, expected, strict=True))


def _in_fresh_process(name: str, row: str, n_last: int, n_calls: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--calls", str(n_calls), "--child", name, row, str(n_last)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- in the fresh process


def _measure(name: str, row: str, n_last: str, *, n_calls: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    search = GROWTH[name][0](int(n_last)) if int(n_last) else SEARCHES[name]()
    if row == LOWER_BOUND:
        return {"seconds": _lower_bound(search)}
    with _context(row, search) as fit:
        started = time.perf_counter()
        fit()
        if time.perf_counter() - started > SLOW_S:
            n_calls = 1
        if row in (HYBRID, OFF):
            # What is warm is warm: workers that are started in the background are there, and tiers were tried.
            time.sleep(3)
            for _ in range(EARLIER_CALLS - 1):
                fit()
        seconds = []
        for _ in range(n_calls):
            started = time.perf_counter()
            found = fit()
            seconds.append(time.perf_counter() - started)
    report = ""
    if row in (HYBRID, OFF):
        import joblib_backends

        report = str(joblib_backends.last_report())
    scores = [float(score) for score in found.cv_results_["mean_test_score"]]
    return {"seconds": median(seconds), "scores": scores, "report": report}


@contextlib.contextmanager
def _context(row: str, search: Search) -> Iterator[Callable[[], Any]]:
    """Yield what runs the search once, as the row does it."""
    import joblib
    from sklearn.model_selection import GridSearchCV

    pipeline = search.pipeline

    def fit() -> Any:
        return GridSearchCV(pipeline, search.grid, cv=search.cv, n_jobs=-1).fit(search.X, search.y)

    with contextlib.ExitStack() as stack:
        if row in (HYBRID, OFF):
            import joblib_backends  # noqa: F401

            stack.enter_context(joblib.parallel_config("hybrid", share_fits=row == HYBRID))
            yield fit
        elif row in ("loky", "threading"):
            stack.enter_context(joblib.parallel_config(row))
            yield fit
        elif row == "dask":
            from distributed import Client, LocalCluster

            cluster = stack.enter_context(LocalCluster(threads_per_worker=1, dashboard_address=None))
            stack.enter_context(Client(cluster))
            stack.enter_context(joblib.parallel_config("dask"))
            yield fit
        elif row == MEMORY:
            stack.enter_context(joblib.parallel_config("loky"))

            def fit_with_memory() -> Any:
                # A new folder for each call: with an old one nothing would be fitted at all.
                with tempfile.TemporaryDirectory() as folder:
                    pipeline.set_params(memory=folder)
                    return fit()

            yield fit_with_memory
        elif row == DASK_ML:
            from dask_ml.model_selection import GridSearchCV as DaskGridSearchCV

            yield lambda: DaskGridSearchCV(pipeline, search.grid, cv=search.cv).fit(search.X, search.y)


def _lower_bound(search: Search) -> float:
    """Return the seconds of the distinct work over the cores, and of the refit."""
    import joblib
    from sklearn.base import clone
    from sklearn.model_selection import ParameterGrid, StratifiedKFold
    from sklearn.utils import _safe_indexing
    from threadpoolctl import threadpool_limits

    clock = time.perf_counter
    last = search.pipeline.steps[-1][0]
    prefixes: dict[str, list[dict[str, Any]]] = {}
    for parameters in ParameterGrid(search.grid):
        prefix = repr(sorted((k, repr(v)) for k, v in parameters.items() if not k.startswith(f"{last}__")))
        prefixes.setdefault(prefix, []).append(parameters)
    seconds = 0.0
    best: tuple[float, dict[str, Any]] = (-1.0, {})
    with threadpool_limits(1):
        for train, test in StratifiedKFold(search.cv).split(search.X, search.y):
            started = clock()
            X_train, y_train = _safe_indexing(search.X, train), search.y[train]
            X_test, y_test = _safe_indexing(search.X, test), search.y[test]
            seconds += clock() - started
            done: dict[str, tuple[float, Any, Any]] = {}
            for candidates in prefixes.values():
                steps = clone(search.pipeline).set_params(**candidates[0]).steps
                Xt, Xv, key = X_train, X_test, ""
                for name, transformer in steps[:-1]:
                    key += f"{name}={transformer!r};"
                    if key not in done:
                        started = clock()
                        fitted = transformer.fit_transform(Xt, y_train)
                        transformed = transformer.transform(Xv)
                        done[key] = (clock() - started, fitted, transformed)
                        seconds += done[key][0]
                    _, Xt, Xv = done[key]
                for parameters in candidates:
                    model = clone(search.pipeline).set_params(**parameters).steps[-1][1]
                    started = clock()
                    score = model.fit(Xt, y_train).score(Xv, y_test)
                    seconds += clock() - started
                    best = max(best, (score, parameters), key=lambda pair: pair[0])
    started = clock()
    clone(search.pipeline).set_params(**best[1]).fit(search.X, search.y)
    return seconds / joblib.cpu_count() + clock() - started


# ---- the report


def _report(document: dict[str, Any]) -> str:
    times = document["times"]
    rows = list(next(iter(times.values())))
    middle = {
        name: {row: median(one["seconds"]) for row, one in found.items() if one["seconds"]}
        for name, found in times.items()
    }
    table = [
        [name, *(_cell(times[name][row]) for row in rows), *(_ratio(middle[name], to) for to in ("loky", "best peer"))]
        for name in times
    ]
    failures = [
        f"{name}, {row}: {one['error']}" for name in times for row, one in times[name].items() if "error" in one
    ]
    goals = [
        [name, f"hybrid / {to}", f"{limit:.2f}", _ratio(middle.get(name, {}), to), _outcome(middle, name, to, limit)]
        for name, to, limit in GOALS
    ]
    growth = [
        [name, *(f"{median(found[key]):.2f}" for key in ("half", "all", "bound half", "bound all")), _growth(found)]
        for name, found in document["growth"].items()
    ]
    reports = [f"{name}: {shared}" for name, one in _reports(times) if (shared := _shared_line(one["report"]))]
    parts = [
        "## Shared fits",
        machine_line(document["machine"]),
        load_warning(document["machine"]),
        f"Seconds of a warm search with its refit; median of {document['rounds']} processes, in each of them that of "
        f"{document['calls']} calls, one where a call takes more than {SLOW_S:g} s; on hybrid's rows after "
        f"{EARLIER_CALLS} calls, on others after one.",
        markdown_table(["search", *rows, "hybrid / loky", "hybrid / best peer"], table),
        "\n".join(failures),
        "### Goals",
        markdown_table(["search", "ratio", "at most", "measured", ""], goals),
        "### Growth",
        "Half and all of the last step's options: what hybrid takes, and the lower bound of each. The last column is "
        "what hybrid adds, over what the lower bound adds.",
        markdown_table(["search", "half", "all", "bound, half", "bound, all", "added / bound"], growth),
        "### What was shared",
        "\n".join(f"- {line}" for line in reports),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _shared_line(report: str) -> str:
    """Return what a report says of sharing. Where the refit itself calls joblib, the last report is of that."""
    return next((line.strip() for line in report.splitlines() if line.strip().startswith("shared")), "")


def _reports(times: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, found[HYBRID]) for name, found in times.items() if found.get(HYBRID, {}).get("report")]


def _cell(one: dict[str, Any]) -> str:
    return f"{median(one['seconds']):.2f}{' ✗' if 'error' in one else ''}" if one["seconds"] else "✗"


def _value(middle: dict[str, float], to: str) -> float | None:
    if to == "best peer":
        return min((middle[peer] for peer in PEERS if peer in middle), default=None)
    return middle.get(to)


def _ratio(middle: dict[str, float], to: str) -> str:
    other = _value(middle, to)
    return f"{middle[HYBRID] / other:.2f}" if other and HYBRID in middle else "not measured"


def _outcome(middle: dict[str, dict[str, float]], name: str, to: str, limit: float) -> str:
    other = _value(middle.get(name, {}), to)
    if not other or HYBRID not in middle[name]:
        return ""
    return "reached" if middle[name][HYBRID] / other <= limit else "MISSED"


def _growth(found: dict[str, list[float]]) -> str:
    half, whole, bound_half, bound = (median(found[key]) for key in ("half", "all", "bound half", "bound all"))
    return f"{(whole - half) / (bound - bound_half):.2f}"


# ---- the shelf


def _print_costs_of_the_shelf() -> None:
    """Print what it takes to put and to take values: for each, for a byte of the pickle, for a byte of the buffers."""
    import numpy as np

    from joblib_backends.data.shelf import Shelf, pack
    from joblib_backends.data.store import default_store

    shelf = Shelf(default_store().make_folders())
    values = {
        "a small one": {"mean_": np.ones(10)},
        "a pickle of 10 MB": {f"word number {i}": i for i in range(400_000)},
        "a buffer of 40 MB": np.ones(5_000_000),
    }
    for name, value in values.items():
        puts, takes = [], []
        for turn in itertools.count():
            started = time.perf_counter()
            packed = pack(value)
            with shelf.claim(name):
                shelf.put(name, packed)
            puts.append(time.perf_counter() - started)
            started = time.perf_counter()
            taken = shelf.take(name)
            takes.append(time.perf_counter() - started)
            del taken
            if turn == 8:
                break
        n_pickled = len(packed.stream)
        print(
            f"{name}: {n_pickled} bytes pickled, {packed.nbytes - n_pickled} in buffers; "
            f"put {median(puts) * 1e6:.0f} µs, taken {median(takes) * 1e6:.0f} µs"
        )
    shelf.close()


if __name__ == "__main__":
    sys.exit(main())
