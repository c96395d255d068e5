"""What can be asked of ``python -m joblib_backends``, and what its ``--help`` says."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any, Final

__all__ = ["parser"]

#: Columns of the descriptions; those of options fit the terminal.
_WIDTH: Final = 100

_CHECKPOINT_CODES: Final = ("0  done", "2  PATH is not there, is no checkpoint, or cannot be read; stderr says why")


def parser() -> argparse.ArgumentParser:
    """Return the parser; the options that it returns have ``command``: demo, run, info, report, show or prune."""
    whole = _described(
        argparse.ArgumentParser(prog="python -m joblib_backends"),
        "The joblib backend 'hybrid' runs code with n_jobs (scikit-learn's, or your own with joblib.Parallel) on "
        "threads, processes or a Dask cluster. These commands try it, run a script with it, and say what it "
        "finds here.",
        "python -m joblib_backends COMMAND --help says more of each.",
        codes=(
            "0  done",
            "1  the results of demo differ; or the script of run ended with an error",
            "2  a wrong command line, something that cannot be started, or a file that cannot be used",
        ),
    )
    commands = whole.add_subparsers(required=True, metavar="demo | run | info | report | checkpoint")
    _add_demo(commands)
    _add_run(commands)
    _add_info(commands)
    _add_report(commands)
    _add_checkpoint(commands)
    return whole


def _described(
    parser: argparse.ArgumentParser, description: str, *examples: str, codes: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Have a parser say what its command does, how it is called and what it exits with."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = textwrap.fill(description, _WIDTH)
    shown = (("examples:", examples), ("exit codes:", codes))
    parser.epilog = "\n\n".join("\n  ".join((title, *lines)) for title, lines in shown if lines)
    return parser


def _add_demo(commands: Any) -> None:
    demo = _described(
        commands.add_parser("demo", help="a grid search on digits, alone and under hybrid"),
        "Run a grid search of scikit-learn's (135 fits on its digits, no download) with n_jobs=1, then with "
        "n_jobs=-1 under hybrid; print both times, where tasks ran and why, and whether all results are equal. "
        "Takes some seconds.",
        "python -m joblib_backends demo",
        codes=(
            "0  the results are equal",
            "1  they differ",
            "2  scikit-learn is missing, or a JOBLIB_BACKEND variable is wrong",
        ),
    )
    demo.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    demo.set_defaults(command="demo")


def _add_run(commands: Any) -> None:
    run = _described(
        commands.add_parser("run", help="run a script with hybrid as its default backend"),
        "Run a script, a folder or zip file with a __main__.py, or with -m a module, as python would, with "
        "hybrid as joblib's default backend, or with what JOBLIB_BACKEND names. Code that names a backend itself "
        "keeps it. Where the package was installed by pip, JOBLIB_BACKEND=hybrid python SCRIPT does the same; "
        "this is for where it does not.",
        "python -m joblib_backends run train.py --folds 5",
        "python -m joblib_backends run -m my_package.train",
        "JOBLIB_BACKEND_SCHEDULER=tcp://host:8786 python -m joblib_backends run train.py",
        codes=(
            "2  there is no such script, or a JOBLIB_BACKEND variable is wrong",
            "otherwise what the script exits with: 1 if it ended with an error",
        ),
    )
    run.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is the name of a module")
    run.add_argument("script", metavar="SCRIPT", help="what to run")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="all that follows is the script's")
    run.set_defaults(command="run")


def _add_info(commands: Any) -> None:
    info = _described(
        commands.add_parser("info", help="what a bug report should say, and what auto would do here"),
        "Say what there is here: versions, cores and their limits, memory, room for data, BLAS and OpenMP "
        "libraries, what names a Dask scheduler, variables, and what tier='auto' would do with calls of several "
        "kinds, and why (of code that it knows nothing of yet). Nothing is started, and no scheduler is asked. "
        "Run it where your program runs, and put what it prints into a bug report; look through the variables "
        "first.",
        "python -m joblib_backends info",
        "python -m joblib_backends info --json > info.json",
        codes=("0  always: what is wrong here (in a variable, say) is told in its section, as 'problem'",),
    )
    info.add_argument("--json", action="store_true", help="one JSON object, and nothing else; sizes in bytes")
    info.set_defaults(command="info")


def _add_report(commands: Any) -> None:
    report = _described(
        commands.add_parser("report", help="what the calls in a trace file did, and pages that show it"),
        "A call with trace=PATH, and every call of a script that runs with JOBLIB_BACKEND_TRACE=PATH, is added to the "
        "file PATH. Say what those calls did: where they ran and why, where the time went, and what to change. The "
        "file can also be opened in https://ui.perfetto.dev.",
        "JOBLIB_BACKEND=hybrid JOBLIB_BACKEND_TRACE=run.json python train.py",
        "python -m joblib_backends report run.json",
        "python -m joblib_backends report run.json --html run.html",
        codes=("0  done", "2  PATH is not there or no such trace, or the page cannot be written; stderr says why"),
    )
    report.add_argument("path", metavar="PATH", help="what was given as trace=, or saved as .json")
    report.add_argument(
        "--html", metavar="PAGE", help="write the timeline of a call to this file, as a page for browsers"
    )
    report.add_argument("--call", metavar="N", type=int, help="only that call, counted from 1; of --html the last one")
    report.add_argument("--json", action="store_true", help="one JSON array of the calls' reports, and nothing else")
    report.set_defaults(command="report")


def _add_checkpoint(commands: Any) -> None:
    checkpoint = _described(
        commands.add_parser("checkpoint", help="what a checkpoint file holds, and how to make it smaller"),
        "A call with checkpoint=PATH keeps the results of its finished tasks in the file PATH, so that the next "
        "run of the script needs to do only the others. Say what is in such a file, or delete what is not needed "
        "any more.",
        "python -m joblib_backends checkpoint show search.ckpt",
        "python -m joblib_backends checkpoint prune search.ckpt --older-than 30",
        codes=_CHECKPOINT_CODES,
    )
    verbs = checkpoint.add_subparsers(required=True, metavar="show | prune")
    show = _described(
        verbs.add_parser("show", help="entries by function, their times and versions"),
        "Say how many results of which functions are in the file, how long their tasks took, with which versions "
        "of packages and when they were made, and whether any are damaged. Nothing is changed.",
        "python -m joblib_backends checkpoint show search.ckpt",
        "python -m joblib_backends checkpoint show --json search.ckpt",
        codes=_CHECKPOINT_CODES,
    )
    show.add_argument("path", metavar="PATH", help="what was given as checkpoint=")
    show.add_argument(
        "--json", action="store_true", help="one JSON object, and nothing else; times in seconds since 1970"
    )
    show.set_defaults(command="show")
    _add_prune(verbs)


def _add_prune(verbs: Any) -> None:
    prune = _described(
        verbs.add_parser(
            "prune", help="delete damaged entries, and those that all given options are true of; all others stay"
        ),
        "Delete damaged entries, and those that all given options are true of; without options, damaged ones "
        "only. The file gets smaller. Tasks whose results are deleted run again when they are next needed.",
        "python -m joblib_backends checkpoint prune search.ckpt --older-than 30",
        "python -m joblib_backends checkpoint prune search.ckpt --function _fit_and_score --older-than 7",
        "python -m joblib_backends checkpoint prune search.ckpt --all",
        codes=_CHECKPOINT_CODES,
    )
    prune.add_argument("path", metavar="PATH", help="what was given as checkpoint=")
    prune.add_argument("--older-than", metavar="DAYS", type=float, help="made more than so many days ago")
    prune.add_argument("--function", metavar="NAME", help="of the function of that name, as `show` prints it")
    prune.add_argument("--other-versions-than", metavar="TEXT", help="made with other versions, as `show` prints them")
    prune.add_argument("--all", action="store_true", help="every entry")
    prune.set_defaults(command="prune")
