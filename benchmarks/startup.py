"""What does the installed ``.pth`` file cost an interpreter that does not use the package?

Every start of Python reads the ``.pth`` files of site-packages and executes their import lines. This script
starts Python again and again, in turn with an empty folder, with one that holds an empty ``.pth`` and with
one that holds ours, lets ``site`` read it as it does at start-up, and prints the differences in microseconds.

Usage: ``python benchmarks/startup.py [--starts N]``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter_ns

SOURCES = (Path(__file__).resolve().parent.parent / "pth", Path(sysconfig.get_path("purelib")))
FILES = ("joblib_backends.pth", "_joblib_backends_hook.py")

#: -S keeps the interpreter's own site-packages out; ``site`` itself is loaded before the clock starts.
PROGRAM = """
import os, site, sys, time
start = time.perf_counter_ns()
site.addsitedir(sys.argv[1])
print(time.perf_counter_ns() - start)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cost of the line in the ``.pth`` file; return 1 if there is none to be found."""
    parser = argparse.ArgumentParser(description="Time the .pth file of joblib_backends.")
    parser.add_argument("--starts", type=int, default=30, help="interpreters of each kind (default: %(default)s)")
    starts = parser.parse_args(arguments).starts
    with tempfile.TemporaryDirectory() as scratch:
        folders = {kind: Path(scratch, kind) for kind in ("no .pth", "an empty .pth", "our .pth")}
        for folder in folders.values():
            folder.mkdir()
        Path(folders["an empty .pth"], "empty.pth").touch()
        source = _copy_hook(folders["our .pth"])
        if source is None:
            print(f"{FILES[0]} is in none of {', '.join(map(str, SOURCES))}.")
            return 1
        inner: dict[str, list[float]] = {kind: [] for kind in folders}
        outer: dict[str, list[float]] = {kind: [] for kind in folders}
        for _ in range(starts):
            for kind, folder in folders.items():
                whole, part = _start(folder)
                outer[kind].append(whole)
                inner[kind].append(part)
    print(f"{source}, {starts} starts of each kind, in turn; microseconds, median (quartiles)")
    for kind in folders:
        print(f"  {kind:<13} reading the folder {_summary(inner[kind])}, the whole interpreter {_summary(outer[kind])}")
    nothing, empty, ours = (median(values) for values in inner.values())
    print(f"  our .pth costs {ours - nothing:.0f} microseconds per start, its line {ours - empty:.0f} of them")
    return 0


def _copy_hook(folder: Path) -> Path | None:
    for source in SOURCES:
        if (source / FILES[0]).exists():
            for name in FILES:
                if (source / name).exists():
                    shutil.copy(source / name, folder)
            return source / FILES[0]
    return None


def _start(folder: Path) -> tuple[float, float]:
    """Return the microseconds of one whole interpreter, and of reading ``folder`` in it."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB_BACKEND")}
    start = perf_counter_ns()
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return (perf_counter_ns() - start) / 1e3, int(run.stdout) / 1e3


def _summary(values: list[float]) -> str:
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    sys.exit(main())
