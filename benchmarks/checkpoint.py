"""What a checkpoint costs for each task: to know it, to look it up, to keep its result.

Usage: ``python benchmarks/checkpoint.py [--folder FOLDER] [--save]``. The task is one of a search on digits with a
pipeline of three steps. The file is in FOLDER, by default the system's folder for temporary files: a durable
commit takes what an ``fsync`` takes there. ``--save`` writes ``results/checkpoint.md``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, machine_line
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import check_scoring
from sklearn.model_selection import StratifiedKFold
from sklearn.model_selection._validation import _fit_and_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from joblib_backends.checkpoint.call import CallCheckpoint, ContextCheckpoint

RESULTS = Path(__file__).resolve().parent / "results" / "checkpoint.md"
N_TASKS = 500


def main() -> None:
    """Measure, print, and save if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = _table(_measured(Path(folder) / "search.ckpt"))
    print(text)
    if options.save:
        RESULTS.write_text(text, encoding="utf-8")


def _measured(path: Path) -> dict[str, list[float]]:
    """Return the microseconds of each task for each part of the work."""
    checkpoint = CallCheckpoint(ContextCheckpoint(path))
    times: dict[str, list[float]] = {"know": [], "look up": [], "keep": [], "look up what is there": []}
    for task in _tasks():
        keys = _timed(times["know"], lambda task=task: checkpoint.keys_of([task]))
        _timed(times["look up"], lambda keys=keys: checkpoint.recall(keys))
        result = [_result()]
        _timed(times["keep"], lambda keys=keys, task=task, result=result: checkpoint.keep(keys, [task], result, 0.1))
        _timed(times["look up what is there"], lambda keys=keys: checkpoint.recall(keys))
    return times


def _timed(times: list[float], work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    done = work()
    times.append((time.perf_counter() - started) * 1e6)
    return done


def _tasks() -> list[Any]:
    """Return tasks as GridSearchCV makes them: candidates by folds."""
    data, target = load_digits(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), PCA(8, random_state=0), LogisticRegression())
    scorer = check_scoring(pipeline)
    folds = list(StratifiedKFold(5).split(data, target))
    options = {"scorer": scorer, "verbose": 0, "fit_params": {}, "score_params": {}}
    return [
        (
            _fit_and_score,
            (pipeline, data, target),
            {**options, "train": train, "test": test, "parameters": {"logisticregression__C": float(candidate)}},
        )
        for candidate in np.logspace(-3, 3, N_TASKS // 5)
        for train, test in folds
    ]


def _result() -> dict[str, Any]:
    return {"fit_error": None, "test_scores": 0.9, "n_test_samples": 360, "fit_time": 0.1, "score_time": 0.01}


def _table(times: dict[str, list[float]]) -> str:
    rows = [f"| {name} | {statistics.median(values):.0f} | {_high(values):.0f} |" for name, values in times.items()]
    whole = [sum(values) for values in zip(times["know"], times["look up"], times["keep"], strict=True)]
    rows.append(f"| **a task that runs** | **{statistics.median(whole):.0f}** | {_high(whole):.0f} |")
    lines = "\n".join(rows)
    return (
        f"# What a checkpoint costs\n\n{machine_line(describe_machine())}\n\nMicroseconds for each of {N_TASKS} "
        "fit-and-score tasks, by `python benchmarks/checkpoint.py --save`. Goal: below 1,000.\n\n"
        f"| part | median | 95 of 100 below |\n|---|---:|---:|\n{lines}\n"
    )


def _high(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


if __name__ == "__main__":
    main()
