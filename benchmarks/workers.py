"""How soon are N workers ready, and how much memory do they take: loky's, and ours?

Each measurement is a fresh interpreter that has imported scikit-learn, as a user's has; the two kinds take turns.
Time is from the first submit until N different workers have returned a result; memory is the sum of the
proportional set sizes (PSS) of everything that was started: workers, servers, trackers.

Usage: ``python benchmarks/workers.py [--rounds N] [--workers 2 8 16]``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

#: What each kind runs, given the number of workers: it must define ``submit`` and may look at ``n``.
STARTS = {
    "loky": """
from loky import get_reusable_executor
submit = get_reusable_executor(max_workers=n, timeout=300).submit
""",
    "ours": """
from joblib_backends.workers.pool import WorkerPool
pool = WorkerPool.get(b"", 300.0)
pool.need(frozenset({"sklearn"}))
submit = pool.join(n).submit
""",
    "ours, no server": """
from joblib_backends.workers.pool import WorkerPool
from joblib_backends.workers.server import ForkServer
ForkServer.enabled = False
pool = WorkerPool.get(b"", 300.0)
submit = pool.join(n).submit
""",
}

#: Every task imports what a scikit-learn task needs, and waits until all workers are there.
PROGRAM = """
import json, os, sys, tempfile, time
import psutil, sklearn.ensemble, sklearn.linear_model, sklearn.model_selection, sklearn.svm
import joblib_backends, joblib_backends.worker
n = int(sys.argv[1])
{start}
TASK = '''
import os, sys, time
import sklearn.ensemble, sklearn.linear_model, sklearn.model_selection, sklearn.svm
open(os.path.join(folder, str(os.getpid())), 'w').close()
while len(os.listdir(folder)) < n:
    time.sleep(0.005)
'''
with tempfile.TemporaryDirectory() as folder:
    begin = time.perf_counter()
    futures = [submit(exec, TASK, {{'folder': folder, 'n': n}}) for _ in range(n)]
    for future in futures:
        future.result(300)
    seconds = time.perf_counter() - begin
    started = psutil.Process().children(recursive=True)
    pss = sum(process.memory_full_info().pss for process in started)
print(json.dumps([seconds, pss, len(started)]), flush=True)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of medians."""
    parser = argparse.ArgumentParser(description="Time and weigh the start of workers.")
    parser.add_argument("--rounds", type=int, default=3, help="interpreters of each kind (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--kinds", nargs="+", default=list(STARTS), choices=list(STARTS))
    options = parser.parse_args(arguments)
    print(f"{'workers':>7}  {'kind':<16} {'seconds':>8} {'(all)':<24} {'PSS MB':>8}  processes")
    for n in options.workers:
        found: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in options.kinds}
        for _ in range(options.rounds):
            for kind in options.kinds:
                found[kind].append(measure(kind, n))
        for kind, rows in found.items():
            seconds, pss, processes = (median(column) for column in zip(*rows, strict=True))
            spread = " ".join(f"{row[0]:.2f}" for row in rows)
            print(f"{n:>7}  {kind:<16} {seconds:>8.2f} {spread:<24} {pss / 1e6:>8.0f}  {processes:.0f}", flush=True)
    return 0


def measure(kind: str, n_workers: int) -> tuple[float, float, int]:
    """Return the seconds, the bytes of PSS and the processes of one start in a fresh interpreter."""
    program = PROGRAM.format(start=STARTS[kind])
    run = subprocess.run([sys.executable, "-c", program, str(n_workers)], capture_output=True, text=True, check=True)
    seconds, pss, processes = json.loads(run.stdout.splitlines()[-1])
    return seconds, pss, processes


if __name__ == "__main__":
    sys.exit(main())
