"""``python -m joblib_backends demo | run SCRIPT [ARGS...] | info | report PATH | checkpoint show|prune PATH``.

``demo`` shows a grid search alone and under hybrid, ``run`` runs an unmodified script where ``.pth`` files are not
read (``python -S``, an embedded interpreter), ``info`` says what a bug report should say, ``report`` what the calls in
a trace file did, ``checkpoint`` shows what is kept in a file, and deletes what is not needed any more.

Exit codes: what the script of ``run`` exits with; 1 if the results of ``demo`` differ; 2 for a wrong command line, what
cannot be started, or a file that cannot be used; else 0. ``--help`` of each command says its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import joblib

from .activation import activate
from .command_line import parser
from .config import select_backend
from .errors import HybridError
from .report import CallReport, last_report
from .surroundings import surroundings
from .timeline.chrome import calls_in
from .wording import readable_nbytes

__all__ = ["main"]

#: What ``info`` shows in bytes.
_NBYTES: Final = frozenset({"memory", "free memory"})

#: The grid of ``demo``: 135 fits, some ten seconds on one core, so that the start of workers does not hide the gain.
_GRID: Final[dict[str, list[Any]]] = {
    "pca__n_components": [16, 32, 48],
    "svc__C": [0.1, 1.0, 10.0],
    "svc__gamma": [0.003, 0.01, 0.03],
}
_SMALL_GRID: Final[dict[str, list[Any]]] = {"pca__n_components": [8, 16], "svc__C": [1.0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks and return the exit code."""
    options = parser().parse_args(arguments)
    commands = {
        "demo": _demo,
        "run": _run,
        "info": _info,
        "report": _report,
        "show": _show_checkpoint,
        "prune": _prune_checkpoint,
    }
    return commands[options.command](options)


def _refuse(sentence: str) -> int:
    print(f"joblib_backends: {sentence}", file=sys.stderr)
    return 2


# ---- demo


def _demo(options: argparse.Namespace) -> int:
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        return _refuse("The demo needs scikit-learn: pip install 'joblib-backends[sklearn]'.")
    try:
        return _compare(_SMALL_GRID if options.small else _GRID)
    except HybridError as error:  # what the environment asks for cannot be had
        return _refuse(str(error))


def _compare(grid: Mapping[str, list[Any]]) -> int:
    """Run the search of ``grid`` alone and under hybrid; print how both went, and return 1 if they differ."""
    print("GridSearchCV of StandardScaler, PCA and SVC on scikit-learn's digits, 5 folds.")
    alone, alone_s = _timed_search(grid, n_jobs=1)
    _show("n_jobs=1, no backend", f"best score {alone.best_score_:.6f} in {alone_s:.2f} s")
    before = last_report()
    with joblib.parallel_backend("hybrid"):
        hybrid, hybrid_s = _timed_search(grid, n_jobs=-1)
    _show("n_jobs=-1, hybrid", f"best score {hybrid.best_score_:.6f} in {hybrid_s:.2f} s")
    report = last_report()
    # With one core joblib runs its sequential loop, which leaves no report.
    ran = report is not None and report is not before
    _show("tier", report.tier if report and ran else "none")
    _show("reason", report.reason if report and ran else "one core, so joblib ran a plain loop")
    _show("ratio of times", f"{alone_s / hybrid_s:.2f}")
    differing = _differing_columns(alone.cv_results_, hybrid.cv_results_)
    n_combinations = len(alone.cv_results_["params"])
    if differing:
        _show("cv_results_", f"of {n_combinations} combinations DIFFER in {', '.join(differing)}")
        return 1
    _show("cv_results_", f"of {n_combinations} combinations are equal, in all columns but times")
    return 0


def _show(name: str, text: str) -> None:
    print(f"  {name:<22}{text}", flush=True)


def _timed_search(grid: Mapping[str, list[Any]], n_jobs: int) -> tuple[Any, float]:
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    data, target = load_digits(return_X_y=True)
    pipeline = Pipeline([("scale", StandardScaler()), ("pca", PCA(random_state=0)), ("svc", SVC())])
    search = GridSearchCV(pipeline, grid, cv=5, n_jobs=n_jobs)
    started = time.perf_counter()
    search.fit(data, target)
    return search, time.perf_counter() - started


def _differing_columns(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of the columns that are not the same in both, without those of times."""
    names = sorted(name for name in {*one, *other} if not name.endswith("_time"))
    return [name for name in names if list(one.get(name, ())) != list(other.get(name, ()))]


# ---- run


def _run(options: argparse.Namespace) -> int:
    is_file = not options.is_module
    if is_file and not os.path.exists(options.script):
        return _refuse(f"The script {options.script!r} cannot be run, because there is no such file.")
    select_backend("hybrid")
    try:
        activate()
    except HybridError as error:
        return _refuse(str(error))
    sys.argv = [options.script, *options.arguments]
    if is_file:
        _put_on_path(options.script)
        runpy.run_path(options.script, run_name="__main__")
    else:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    return 0


def _put_on_path(script: str) -> None:
    """Have in ``sys.path[0]``, the working directory after ``python -m``, what ``python SCRIPT`` has there."""
    if sys.flags.safe_path:
        return
    if os.path.isfile(script):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    else:
        del sys.path[0]  # run_path puts a folder there itself


# ---- info


def _info(options: argparse.Namespace) -> int:
    for name in ("numpy", "sklearn"):  # they load BLAS and OpenMP, which are to be told of
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    found = surroundings()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, content in found.items():
        print(title)
        lines = _lines_of(title, content)
        width = max((len(name) for name, _ in lines), default=0)
        for name, text in lines:
            print(f"  {name:<{max(20, width)}}  {text}")
        if not lines:
            print("  none")
    return 0


def _lines_of(title: str, content: Any) -> list[tuple[str, str]]:
    """Return the lines of one section, as (name, text)."""
    if title == "libraries":
        return [(_library(one), f"{one['num_threads']} threads, {one['filepath']}") for one in content]
    return [(name, _text_of(name, value)) for name, value in content.items()]


def _library(found: Mapping[str, Any]) -> str:
    return f"{found['internal_api']} {found['version'] or ''}".rstrip()


def _text_of(name: str, value: Any) -> str:
    if isinstance(value, dict) and "words" in value:
        return str(value["words"])
    if isinstance(value, dict):
        refused = "" if value["writable"] else ", not writable"
        return f"{readable_nbytes(value['free'])} free of {readable_nbytes(value['total'])}{refused}"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return readable_nbytes(value) if name in _NBYTES else str(value)


# ---- report


def _report(options: argparse.Namespace) -> int:
    path = options.path
    try:
        calls = [CallReport.from_dict(*call) for call in calls_in(Path(path).read_text(encoding="utf-8"))]
        texts = [str(call) for call in calls]
    except OSError as error:
        return _refuse(f"The trace {path!r} cannot be read: {error.strerror or error}.")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _refuse(f"{path!r} is no trace of this package, as trace= writes them: {error}.")
    if options.call is not None:
        if not 1 <= options.call <= len(calls):
            return _refuse(f"There is no call {options.call} in {path!r}: it has {len(calls)}, counted from 1.")
        calls, texts = [calls[options.call - 1]], [texts[options.call - 1]]
    if options.html is not None:
        try:
            calls[-1].save(options.html)
        except (OSError, HybridError) as error:
            return _refuse(f"The page cannot be written. {error}")
    if options.json:
        print(json.dumps([call.to_dict() for call in calls], indent=2))
    else:
        text = "\n\n".join(texts)
        # What tasks said may be more than a terminal can show.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


# ---- checkpoint


def _show_checkpoint(options: argparse.Namespace) -> int:
    from .checkpoint.journal import summary

    try:
        found = summary(options.path)
    except HybridError as error:
        return _refuse(str(error))
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    print(options.path)
    _show("entries", f"{found.entries}, {readable_nbytes(found.nbytes)} of results in {_nbytes_of(found)}")
    for name, of_function in found.functions.items():
        _show(name, f"{of_function.entries} entries, {of_function.seconds:.1f} s of work")
    for versions, count in found.versions.items():
        _show("made with", f"{versions}: {count} entries")
    if found.oldest is not None and found.newest is not None:
        _show("made", f"{_local_time(found.oldest)} to {_local_time(found.newest)}")
    if found.damaged:
        _show("damaged", f"{found.damaged} entries, which are not used")
    return 0


def _nbytes_of(found: Any) -> str:
    return f"a file of {readable_nbytes(found.file_nbytes)}"


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _prune_checkpoint(options: argparse.Namespace) -> int:
    from .checkpoint.journal import prune

    days = options.older_than
    try:
        n_deleted = prune(
            options.path,
            older_than_s=None if days is None else days * 86_400,
            function=options.function,
            other_than_versions=options.other_versions_than,
            everything=options.all,
        )
    except HybridError as error:
        return _refuse(str(error))
    print(f"{n_deleted} entries deleted from {options.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
