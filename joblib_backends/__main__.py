"""``python -m joblib_backends demo | run SCRIPT [ARGS...] | info | checkpoint show|prune PATH``.

``demo`` shows a grid search alone and under hybrid, ``run`` runs an unmodified script where ``.pth`` files are not
read (``python -S``, an embedded interpreter), ``info`` says what a bug report should say, ``checkpoint`` shows what is
kept in a file, and deletes what is not needed any more.

Exit codes: what the script of ``run`` exits with; 1 if the results of ``demo`` differ; 2 for what cannot be started, or
a file that cannot be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import joblib

from .activation import activate
from .budget import available_cores
from .config import Config, select_backend, temp_folder_from_environment, variables_set
from .errors import HybridError
from .report import last_report, readable_nbytes
from .tiers import load_tier, tier_names

__all__ = ["main"]

_DISTRIBUTIONS: Final = (
    "joblib-backends",
    "joblib",
    "loky",
    "numpy",
    "cloudpickle",
    "threadpoolctl",
    "xxhash",
    "scikit-learn",
    "scipy",
    "pandas",
    "distributed",
)

#: The grid of ``demo``: 135 fits, some ten seconds on one core, so that the start of workers does not hide the gain.
_GRID: Final[dict[str, list[Any]]] = {
    "pca__n_components": [16, 32, 48],
    "svc__C": [0.1, 1.0, 10.0],
    "svc__gamma": [0.003, 0.01, 0.03],
}
_SMALL_GRID: Final[dict[str, list[Any]]] = {"pca__n_components": [8, 16], "svc__C": [1.0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks and return the exit code."""
    options = _parser().parse_args(arguments)
    return int(options.do(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m joblib_backends", description="One joblib backend for all places.")
    commands = parser.add_subparsers(required=True, metavar="demo | run | info | checkpoint")

    demo = commands.add_parser("demo", help="a grid search on digits, alone and under hybrid")
    demo.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    demo.set_defaults(do=_demo)

    run = commands.add_parser(
        "run", help="run a script with the backend of JOBLIB_BACKEND, or hybrid, as the default one"
    )
    run.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is the name of a module")
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    run.set_defaults(do=_run)

    info = commands.add_parser("info", help="versions, cores, room for data, variables and tiers")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(do=_info)

    checkpoint = commands.add_parser("checkpoint", help="what a checkpoint file holds, and how to make it smaller")
    verbs = checkpoint.add_subparsers(required=True, metavar="show | prune")
    show = verbs.add_parser("show", help="entries by function, their times and versions")
    show.add_argument("path", metavar="PATH")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(do=_show_checkpoint)
    prune = verbs.add_parser(
        "prune", help="delete damaged entries, and those that all given options are true of; all others stay"
    )
    prune.add_argument("path", metavar="PATH")
    prune.add_argument("--older-than", metavar="DAYS", type=float, help="made more than so many days ago")
    prune.add_argument("--function", metavar="NAME", help="of the function of that name, as `show` prints it")
    prune.add_argument("--other-versions-than", metavar="TEXT", help="made with other versions, as `show` prints them")
    prune.add_argument("--all", action="store_true", help="every entry")
    prune.set_defaults(do=_prune_checkpoint)
    return parser


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
    found = _facts()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, content in found.items():
        print(title)
        for name, text in content.items():
            _show(name, str(text))
    return 0


def _facts() -> dict[str, dict[str, Any]]:
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}},
        "machine": {"platform": platform.platform(), "cores available": available_cores(Config())},
        "room for data": {place: _room(place) for place in _places()},
        "environment": variables_set(),
        "tiers": {name: _state_of_tier(name) for name in tier_names() if name != "auto"},
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _places() -> list[str]:
    places = [temp_folder_from_environment(), "/dev/shm", tempfile.gettempdir()]
    return list(dict.fromkeys(place for place in places if place and os.path.isdir(place)))


def _room(place: str) -> str:
    usage = shutil.disk_usage(place)
    return f"{readable_nbytes(usage.free)} free of {readable_nbytes(usage.total)}"


def _state_of_tier(name: str) -> str:
    try:
        load_tier(name)
    except HybridError as error:
        return str(error)
    return "can be used"


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
