"""What is left of a call when something breaks: joblib's loky and dask backends, and hybrid, fault by fault.

Who runs where: the *parent* (``main``) starts one *supervisor* per fault and backend, where it may in a mount namespace
with a ``/dev/shm`` of its own. The supervisor starts the *driver*, a fresh process that does what a user's script does:
it enters the backend, makes a call, and then a second, harmless one. Tasks append a line to a log when they start and
when they finish; once ten have finished the supervisor strikes, from outside, and then only watches: does the call
come back, with what, and what is left when the driver has ended? Every process that the driver leaves becomes a child
of the supervisor (it is a subreaper), so none escapes the count, nor the end of the cell.

A call that does not come back within the limit *hangs*; it gets a Ctrl-C, as it would from a user, before the second
call. Seconds tell a moment from for ever and no more than that: tasks sleep, and most of the time is start-up.

Usage: ``python benchmarks/faults.py [--backends loky,dask,hybrid] [--faults NAME,...] [--limit SECONDS]
[--save NAME]``; ``--list`` prints the names of the faults. Cells that were saved before and are not measured again are
kept, so that backends can be run one by one; ``--table NAME`` only draws ``results/NAME.md`` again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from layout import markdown_table
from machine import describe_machine, machine_line
from sklearn.base import BaseEstimator, ClassifierMixin

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BACKENDS = ("loky", "dask", "hybrid")

N_TASKS = 40
TASK_S = 0.1
#: Finished tasks after which the supervisor strikes: a second into a call of three.
STRIKE_AFTER = 10
#: The task, and the candidate of a search, that go wrong.
POISON, POISONED_CANDIDATE = 13, 3
N_CANDIDATES, N_FOLDS = 10, 4
#: Seconds that a driver has to come back from Ctrl-C, to end after its last line, and its processes to go after that.
INTERRUPT_S, EXIT_S, GONE_S = 15.0, 20.0, 10.0
#: joblib keeps arrays in /dev/shm only where that has two gigabytes.
ROOMY_SHM = "6g"


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and in which kind of call."""

    name: str
    title: str
    strike: str = ""
    kind: str = "tasks"
    nbytes: int = 0
    backends: tuple[str, ...] = BACKENDS
    #: A scheduler and workers that are processes of their own, not a ``LocalCluster`` of the driver.
    is_on_cluster: bool = False
    #: The supervisor starts the driver a second time.
    is_restarted: bool = False
    shm: str = ROOMY_SHM
    parallel_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    hybrid_options: dict[str, Any] = field(default_factory=dict)


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none", "none, for comparison"),
        Fault("worker", "one worker is killed (SIGKILL)", "worker"),
        Fault("poison", "a task always kills its worker", kind="poison"),
        Fault("poison-search", "one candidate of a search always kills its worker", kind="poison-search"),
        Fault(
            "endless",
            "a task never ends (`timeout=5`; hybrid: `task_timeout=2`)",
            kind="endless",
            parallel_options={"loky": {"timeout": 5}, "dask": {"timeout": 5}},
            hybrid_options={"task_timeout": 2},
        ),
        Fault("scheduler", "the Dask scheduler is killed", "scheduler", backends=BACKENDS[1:], is_on_cluster=True),
        Fault("workers", "all Dask workers are killed", "workers", backends=BACKENDS[1:], is_on_cluster=True),
        Fault(
            "file",
            "the data's files are deleted (20 MB array)",
            "file",
            nbytes=20_000_000,
            parallel_options={backend: {"batch_size": 1} for backend in BACKENDS},
        ),
        Fault("shm", "`/dev/shm` of 64 MB, 100 MB array", nbytes=100_000_000, shm="64m"),
        Fault("driver", "the calling process is killed (20 MB array)", "driver", nbytes=20_000_000, is_restarted=True),
        Fault(
            "driver-search",
            "the calling process is killed in a search, which is started again (hybrid: `checkpoint=`)",
            "driver",
            kind="search",
            is_restarted=True,
            hybrid_options={"checkpoint": "{folder}/checkpoint"},
        ),
        Fault("interrupt", "SIGINT to the calling process", "interrupt"),
        Fault("ctrl-c", "Ctrl-C in a terminal (SIGINT to the process group)", "ctrl-c"),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cells asked for, print the table, and save it if asked to."""
    parser = argparse.ArgumentParser(description="Break calls, and see what is left of them.")
    parser.add_argument("--backends", type=_names_among(BACKENDS), default=BACKENDS, help="names with commas between")
    parser.add_argument("--faults", type=_names_among(FAULTS), default=tuple(FAULTS), help="names with commas between")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a call hangs (default: 60)")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json and NAME.md")
    parser.add_argument("--table", metavar="NAME", help="only draw results/NAME.md again")
    parser.add_argument("--list", action="store_true", help="print the names of the faults")
    parser.add_argument("--cell", nargs=2, metavar=("FAULT", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print(*(f"{fault.name:<14} {fault.title}" for fault in FAULTS.values()), sep="\n")
    elif options.cell:
        print(json.dumps(Supervisor(*options.cell, limit_s=options.limit).run()), flush=True)
    elif options.table:
        _save(options.table, _saved(options.table))
    else:
        _measure_all(options.backends, options.faults, options.limit, options.save)
    return 0


def _names_among(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := [name for name in found if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return found

    return names


# ---- the parent


def _measure_all(backends: Sequence[str], faults: Sequence[str], limit_s: float, name: str | None) -> None:
    document = _saved(name) if name else {"backends": {}, "cells": {}}
    for backend in backends:
        document["backends"][backend] = machine = describe_machine()
        for fault in faults:
            outcome = _run_cell(FAULTS[fault], backend, limit_s)
            outcome |= {"limit_s": limit_s, "date": machine["date"], "commit": machine["commit"]}
            document["cells"].setdefault(fault, {})[backend] = outcome
            print(f"{fault:<14} {backend:<7} {_cell(outcome, {})}", file=sys.stderr, flush=True)
            if name:
                _save(name, document)
    print(_report(document))


def _run_cell(fault: Fault, backend: str, limit_s: float) -> dict[str, Any]:
    if backend not in fault.backends:
        return {"result": "not applicable"}
    command = [sys.executable, str(HERE / "faults.py"), "--limit", str(limit_s), "--cell", fault.name, backend]
    namespace = _namespace(fault.shm)
    if not namespace and fault.shm != ROOMY_SHM:
        return {"result": "skipped: no mount namespace is allowed here"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # With the supervisor's own session, a Ctrl-C here reaches only this process, which then ends the supervisor.
        cell = subprocess.Popen(
            [*namespace, *command], env=_environment(), stdout=out, stderr=err, start_new_session=True
        )
        try:
            cell.wait(5 * limit_s + 120)
        except subprocess.TimeoutExpired:
            pass
        finally:
            cell.terminate()
            cell.wait()
        lines, reasons = (_lines(stream) for stream in (out, err))
    if cell.returncode or not lines:
        return {"result": f"the supervisor failed: {(reasons or ['no output'])[-1]}"}
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome


def _namespace(shm: str) -> list[str]:
    """Return the start of a command that gives it a ``/dev/shm`` of this size, or nothing where that is forbidden."""
    mount = f'mount -t tmpfs -o size={shm} tmpfs /dev/shm && exec "$0" "$@"'
    for flags in ("-m", "-rm"):
        command = ["unshare", flags, "sh", "-c", mount]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
    return []


def _environment() -> dict[str, str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("JOBLIB_", "DASK_"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Workers of every kind must be able to import the tasks.
    return environment | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))), "OMP_NUM_THREADS": "1"}


def _lines(stream: Any) -> list[str]:
    stream.seek(0)
    return stream.read().strip().splitlines()


# ---- the supervisor


class Supervisor:
    """One fault on one backend: starts the driver, strikes, watches, counts what is left, and ends it all.

    Attributes
    ----------
    folder : Path
        What the cell writes: the tasks' log, the driver's events, and ``tmp``, its folder for temporary files.
    outcome : dict
        What is reported.
    """

    def __init__(self, fault: str, backend: str, *, limit_s: float) -> None:
        self.fault, self.backend, self.limit_s = FAULTS[fault], backend, limit_s
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.outcome: dict[str, Any] = {}
        self._cluster: list[subprocess.Popen[bytes]] = []
        self._address = ""
        self._files_before: set[Path] = set()

    def run(self) -> dict[str, Any]:
        """Return the outcome; nothing that was started is alive then."""
        be_subreaper = 36
        ctypes.CDLL(None).prctl(be_subreaper, 1, 0, 0, 0)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
        # An ignored SIGINT (a background job's) would be inherited, and Ctrl-C be without effect.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        (self.folder / "tmp").mkdir()
        try:
            if self.fault.is_on_cluster:
                self._start_cluster()
            self._files_before = set(self._all_files())
            self._watch(self._start_driver(1))
            self._look_at_what_is_left(self.outcome)
            if self.fault.is_restarted and "struck" in self.outcome:
                self._restart()
        finally:
            self._end_everything()
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.outcome

    def _start_driver(self, turn: int) -> subprocess.Popen[bytes]:
        # With -c there is no main module that worker processes would have to import again.
        arguments = (self.fault.name, self.backend, str(self.folder), self._address, str(turn))
        return self._start("-c", f"import faults; faults.drive{arguments!r}", log=f"driver-{turn}")

    def _start(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"TMPDIR": str(self.folder / "tmp"), "XDG_CACHE_HOME": str(self.folder / "cache")}
        with open(self.folder / f"{log}.txt", "w") as output:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _start_cluster(self) -> None:
        description = self.folder / "scheduler.json"
        at = ("--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(description))
        self._cluster.append(self._start("-m", "dask", "scheduler", "--port", "0", *at, log="scheduler"))
        for number in (1, 2):
            options = ("--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder / f"worker-{number}"))
            self._cluster.append(self._start("-m", "dask", "worker", *options, *at, log=f"worker-{number}"))
        self._wait(lambda: description.exists(), 30)
        self._address = json.loads(description.read_text())["address"]

    # The call. ---------------------------------------------------------------------------------------------

    def _watch(self, driver: subprocess.Popen[bytes]) -> None:
        """Follow the first driver from its start to its end."""
        self._wait(lambda: self._event("call") or driver.poll() is not None, 60)
        begun = (self._event("call") or {"at": time.monotonic()})["at"]
        deadline = begun + self.limit_s
        struck = self._strike_in_the_middle(driver, deadline)
        if self.fault.strike == "driver" and struck is not None:
            self.outcome |= {"result": "killed", **self._counts()}
            return
        self._wait(lambda: self._event("back") or driver.poll() is not None, deadline - time.monotonic())
        self._note_result(driver, begun, struck)
        if self._event("back"):
            self._wait(lambda: self._event("next") or driver.poll() is not None, self.limit_s)
        self.outcome["next_call"] = self._next_call(driver)
        since = time.monotonic()
        if not self._wait(lambda: driver.poll() is not None, EXIT_S if self._event("next") else 0):
            driver.kill()
            driver.wait()
            self.outcome["exits"] = False
        self.outcome["exit_s"] = time.monotonic() - since

    def _strike_in_the_middle(self, driver: subprocess.Popen[bytes], deadline: float) -> float | None:
        if not self.fault.strike:
            return None
        enough = self._wait(
            lambda: len(_finished(self._log())) >= STRIKE_AFTER or self._event("back") or driver.poll() is not None,
            deadline - time.monotonic(),
        )
        if not enough or self._event("back") or driver.poll() is not None:
            return None
        self.outcome["struck"] = self._strike(driver)
        return time.monotonic()

    def _strike(self, driver: subprocess.Popen[bytes]) -> int:
        """Do the damage; return to how many processes or files."""
        what = self.fault.strike
        if what == "worker":
            os.kill(_busy_worker(self._log()), signal.SIGKILL)
        elif what == "scheduler":
            self._cluster[0].kill()
        elif what == "workers":
            for worker in self._cluster[1:]:
                worker.kill()
        elif what == "file":
            # What holds data, not the locks and semaphores beside it.
            files = [path for path in self._new_files() if path.is_file() and path.stat().st_size > 1_000_000]
            for path in files:
                path.unlink()
            return len(files)
        elif what == "driver":
            driver.kill()
            driver.wait()
        elif what == "interrupt":
            driver.send_signal(signal.SIGINT)
        else:
            os.killpg(driver.pid, signal.SIGINT)
        return 1

    def _note_result(self, driver: subprocess.Popen[bytes], begun: float, struck: float | None) -> None:
        back = self._event("back")
        if back:
            result, now = back["result"], back["at"]
        elif driver.poll() is not None:
            result, now = f"the calling process dies ({_exit_name(driver.returncode)})", time.monotonic()
        else:
            result, now = "hangs", time.monotonic()
        counts = self._counts()
        self.outcome |= {"result": result, "seconds": now - begun, **counts}
        if back:
            self.outcome |= {"is_complete": back["is_complete"], "message": back["message"]}
        self.outcome["lost"] = 0 if back and back["is_complete"] else counts["finished"]
        if struck is not None:
            self.outcome["seconds_after_fault"] = now - struck
        if result == "hangs":
            driver.send_signal(signal.SIGINT)
            self._wait(lambda: self._event("back") or driver.poll() is not None, INTERRUPT_S)

    def _next_call(self, driver: subprocess.Popen[bytes]) -> str:
        if found := self._event("next"):
            return str(found["result"])
        if driver.poll() is None:
            return "no: it hangs" if self._event("back") else "no: Ctrl-C does not bring it back"
        return f"no: the process is gone ({_exit_name(driver.returncode)})"

    def _counts(self) -> dict[str, int]:
        """Return how many tasks have finished, and how many starts were of one that had finished before."""
        lines, done, again = self._log(), set(), 0
        for what, key, _ in lines:
            if what == "end":
                done.add(key)
            else:
                again += key in done
        return {"finished": len(done), "again": again}

    def _restart(self) -> None:
        """Start the same driver again: what is done a second time, and does it sweep what the first has left?"""
        begun = time.monotonic()
        finished = _finished(self._log())
        again = self._start_driver(2)
        self._wait(lambda: self._event("back", 2) or again.poll() is not None, self.limit_s)
        back = self._event("back", 2)
        self._wait(lambda: again.poll() is not None, EXIT_S)
        after: dict[str, Any] = {
            "result": back["result"] if back else "hangs",
            "message": back["message"] if back else "",
            "seconds": time.monotonic() - begun,
            "finished_before": len(finished),
            "of_these_again": len(finished & {key for what, key, _ in self._log(2) if what == "start"}),
        }
        if again.poll() is None:
            again.kill()
        self._look_at_what_is_left(after)
        self.outcome["second_start"] = after

    # What is left. -----------------------------------------------------------------------------------------

    def _look_at_what_is_left(self, into: dict[str, Any]) -> None:
        since = time.monotonic()
        self._wait(lambda: not self._processes(), GONE_S)
        into["processes_gone_s"] = time.monotonic() - since
        into["processes"] = [_describe(process) for process in self._processes()]
        files = [path for path in self._new_files() if path.is_file()]
        into["files"] = dict(Counter(_pattern(self._top(path).name) for path in files))
        into["files_mb"] = sum(path.stat().st_size for path in files) / 1e6

    def _processes(self) -> list[psutil.Process]:
        known = {process.pid for process in self._cluster}
        alive = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
                elif process.pid not in known:
                    os.waitpid(process.pid, os.WNOHANG)
        return [process for process in alive if process.pid not in known]

    def _new_files(self) -> list[Path]:
        return [path for path in self._all_files() if path not in self._files_before]

    def _all_files(self) -> Iterator[Path]:
        for place in self._places():
            yield from place.rglob("*")

    def _places(self) -> tuple[Path, Path]:
        return Path("/dev/shm"), self.folder / "tmp"

    def _top(self, path: Path) -> Path:
        """Return the entry of a folder for temporary files that ``path`` is in."""
        while path.parent not in self._places():
            path = path.parent
        return path

    def _end_everything(self) -> None:
        deadline = time.monotonic() + GONE_S
        for process in self._cluster:
            process.kill()
            process.wait()
        while (left := self._processes()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)

    # What the driver and the tasks have written. -----------------------------------------------------------

    def _wait(self, is_so: Callable[[], Any], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _event(self, name: str, turn: int = 1) -> dict[str, Any] | None:
        path = self.folder / f"events-{turn}"
        for line in path.read_text().splitlines() if path.exists() else ():
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        return None

    def _log(self, turn: int = 1) -> list[list[str]]:
        path = self.folder / f"log-{turn}"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def _finished(lines: list[list[str]]) -> set[str]:
    return {key for what, key, _ in lines if what == "end"}


def _busy_worker(lines: list[list[str]]) -> int:
    """Return the process that was the last to start a task: it is in the middle of it."""
    return int(next(pid for what, _, pid in reversed(lines) if what == "start"))


def _exit_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())[-120:]
    return "ended"


def _pattern(name: str) -> str:
    """Return a file's name without what differs from one run to the next."""
    return re.sub(r"(?<=[-_])[^-_]*\d.*", "*", name)


# ---- the driver


def drive(fault: str, backend: str, folder: str, address: str, turn: str) -> None:
    """Make the call and then a harmless one, as a user's script does, and write down what came of them."""
    where, chosen = Path(folder), FAULTS[fault]

    def event(name: str, **facts: Any) -> None:
        with open(where / f"events-{turn}", "a") as events:
            events.write(json.dumps({"event": name, "at": time.monotonic(), **facts}) + "\n")

    # One name for all starts: it is an argument of the tasks, and another would make them other tasks.
    log = where / "log"
    log.unlink(missing_ok=True)
    log.symlink_to(f"log-{turn}")
    _connect(backend, address)
    event("call")
    try:
        options = {name: str(value).format(folder=folder) if isinstance(value, str) else value
                   for name, value in chosen.hybrid_options.items()}  # fmt: skip
        with _backend(backend, address, options):
            result, is_complete = _call(chosen, backend, str(log), is_first=turn == "1")
        event("back", result=result, is_complete=is_complete, message="")
    except BaseException as error:
        event("back", result=type(error).__name__, is_complete=False, message=_first_line(error))
    try:
        with _backend(backend, address, {}):
            squares = _parallel({})((_square, (number,), {}) for number in range(8))
        event("next", result="yes" if squares == [number**2 for number in range(8)] else "no: a wrong answer")
    except BaseException as error:
        event("next", result=f"no: {type(error).__name__}: {_first_line(error)}")


def _connect(backend: str, address: str) -> None:
    """Make the Dask client that joblib's backend finds by itself."""
    if backend == "dask":
        from distributed import Client, LocalCluster

        Client(address or LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None))


def _backend(backend: str, address: str, options: dict[str, Any]) -> Any:
    import joblib

    if backend == "hybrid":
        import joblib_backends  # noqa: F401

        place = {"scheduler": address} if address else {"tier": "processes"}
        return joblib.parallel_backend("hybrid", **place, **options)
    return joblib.parallel_backend(backend)


def _parallel(options: dict[str, Any]) -> Any:
    import joblib

    return joblib.Parallel(n_jobs=2, **options)


def _call(fault: Fault, backend: str, log: str, *, is_first: bool) -> tuple[str, bool]:
    """Return what came of the call in words, and whether that is all that it should be."""
    if fault.kind.endswith("search"):
        return _search(log, POISONED_CANDIDATE if fault.kind == "poison-search" else -1)
    data = np.ones(fault.nbytes // 8) if fault.nbytes else None
    wrong = fault.kind if is_first else ""
    tasks = ((_task, (log, key, data, wrong if key == POISON else ""), {}) for key in range(N_TASKS))
    answers = _parallel(fault.parallel_options.get(backend, {}))(tasks)
    if answers == list(range(N_TASKS)):
        return "all results", True
    return f"{sum(a == b for a, b in zip(answers, range(N_TASKS), strict=False))} of {N_TASKS} results", False


def _search(log: str, poisoned: int) -> tuple[str, bool]:
    from sklearn.model_selection import GridSearchCV, KFold

    values = np.arange(40)
    search = GridSearchCV(
        Fragile(log, poisoned),
        {"value": list(range(N_CANDIDATES))},
        cv=KFold(N_FOLDS),
        error_score=np.nan,
        refit=False,
        n_jobs=2,
    ).fit(values.reshape(-1, 1), values % 2)
    n_failed = int(np.isnan(search.cv_results_["mean_test_score"]).sum())
    if poisoned < 0:
        return "all results" if not n_failed else f"{n_failed} candidates failed", not n_failed
    return f"the search ends, {n_failed} of {N_CANDIDATES} candidates `nan`", n_failed == 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


# ---- in the workers


class Fragile(ClassifierMixin, BaseEstimator):
    """A classifier of which one ``value`` ends the process that fits it."""

    def __init__(self, log: str = "", poisoned: int = -1, value: int = 0) -> None:
        self.log, self.poisoned, self.value = log, poisoned, value

    def fit(self, values: Any, labels: Any) -> Fragile:
        """Take as long as a task, and write down which candidate and fold it was."""
        _task(self.log, f"{self.value}/{int(values.sum())}", None, "poison" if self.value == self.poisoned else "")
        self.classes_ = np.unique(labels)
        return self

    def predict(self, values: Any) -> Any:
        """Predict the first class."""
        return np.full(len(values), self.classes_[0])


def _task(log: str, key: Any, data: Any, wrong: str) -> Any:
    _note(log, "start", key)
    time.sleep(3600 if wrong == "endless" else TASK_S)
    if wrong == "poison":
        os._exit(1)
    if data is not None:
        assert data.sum() == len(data)
    _note(log, "end", key)
    return key


def _note(log: str, what: str, key: Any) -> None:
    # One unbuffered write to a file opened for appending: lines of different processes do not mix.
    with open(log, "ab", buffering=0) as lines:
        lines.write(f"{what} {key} {os.getpid()}\n".encode())


def _square(number: int) -> int:
    return number**2


# ---- the report


def _saved(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"backends": {}, "cells": {}}
    return document


def _save(name: str, document: dict[str, Any]) -> None:
    RESULTS.joinpath(f"{name}.json").write_text(json.dumps(document, indent=1))
    RESULTS.joinpath(f"{name}.md").write_text(_report(document))


def _report(document: dict[str, Any]) -> str:
    cells = document["cells"]
    backends = [name for name in BACKENDS if name in document["backends"]]
    faults = [fault for fault in FAULTS.values() if fault.name in cells]
    limits = sorted({one["limit_s"] for row in cells.values() for one in row.values() if "limit_s" in one})

    def usual(fault: Fault, name: str) -> dict[str, int]:
        """Return the files that a call without a fault leaves: Dask's lock files, said once, in the first row."""
        found: dict[str, int] = cells.get("none", {}).get(name, {}).get("files", {})
        return {} if fault.name == "none" else found

    table = [
        [fault.title, *(_cell(cells[fault.name].get(name), usual(fault, name)) for name in backends)]
        for fault in faults
    ]
    details = [
        f"- {fault.title}, {name}: {detail}"
        for fault in faults
        for name in backends
        for detail in _details(cells[fault.name].get(name) or {}, usual(fault, name))
    ]
    parts = [
        "## Faults",
        "\n".join(f"- {name}: {machine_line(document['backends'][name])}" for name in backends),
        _how_to_read(" or ".join(f"{limit:g}" for limit in limits)),
        markdown_table(["fault", *backends], table, n_text_columns=1 + len(backends)),
        "### In their own words",
        "\n".join(details) or "None of them said anything.",
    ]
    return "\n\n".join(parts) + "\n"


def _how_to_read(limit: str) -> str:
    return (
        f"{N_TASKS} tasks of {TASK_S} s, `n_jobs=2`, each cell a fresh process; a fault from outside comes once "
        f"{STRIKE_AFTER} tasks have finished. *Hangs*: no result within {limit} s. *Lost*: finished tasks whose "
        "results the caller does not get; *again*: finished tasks that run again. *Next call*: a new `with` block in "
        f"the same process. *Left*: files, and processes {GONE_S:g} s after the end of the calling process (loky's "
        "workers end when they had no work for 300 s). Seconds are rough; they count from a fault that comes from "
        "outside, else from the start of the call. Where a cell says nothing of it, nothing is lost, the next call "
        "works, and no more is left than in the first row."
    )


def _cell(outcome: dict[str, Any] | None, usual: dict[str, int]) -> str:
    """Return an outcome in one line; what is as it should be, and files that are left as usual, are left out."""
    if outcome is None:
        return ""
    if "struck" in outcome and not outcome["struck"]:
        return "not applicable: there are no files"
    if "second_start" in outcome:
        return "; ".join(_parts_of_second_start(outcome, usual))
    if "finished" not in outcome:
        return str(outcome["result"])
    when = outcome.get("seconds_after_fault", outcome["seconds"])
    parts = [outcome["result"] if outcome["result"] == "hangs" else f"{outcome['result']}, {max(when, 0.1):.1f} s"]
    parts += [f"{outcome[what]} {what}" for what in ("lost", "again") if outcome[what]]
    if outcome["next_call"] != "yes":
        parts.append(f"next call: {_short(outcome['next_call'])}")
    elif outcome["result"] == "hangs":
        parts.append("after Ctrl-C the next call works")
    if not outcome.get("exits", True):
        parts.append("must be killed")
    return "; ".join([*parts, *_left(outcome, usual)])


def _parts_of_second_start(outcome: dict[str, Any], usual: dict[str, int]) -> list[str]:
    after = outcome["second_start"]
    here = "; ".join(_left(outcome, usual)) or f"nothing left after {outcome['processes_gone_s']:.1f} s"
    there = "; ".join(_left(after, usual)) or "nothing left"
    again = f"{after['of_these_again']} of {after['finished_before']} finished tasks run again"
    return [here, f"started again: {after['result']}, {again}", f"then {there}"]


def _left(outcome: dict[str, Any], usual: dict[str, int]) -> list[str]:
    n_processes, n_files = len(outcome["processes"]), (Counter(outcome["files"]) - Counter(usual)).total()
    parts = []
    if n_processes:
        parts.append(f"{n_processes} process{'es' if n_processes > 1 else ''}")
    if n_files:
        parts.append(f"{n_files} file{'s' if n_files > 1 else ''} ({outcome['files_mb']:.0f} MB)")
    return [f"{' and '.join(parts)} left"] if parts else []


def _short(text: str) -> str:
    """Return an exception without its message, which stands below the table."""
    return ": ".join(text.split(": ")[:2])


def _details(outcome: dict[str, Any], usual: dict[str, int]) -> Iterator[str]:
    if outcome.get("message"):
        yield f"{outcome['result']}: {outcome['message']}"
    if outcome.get("next_call", "yes").count(": ") > 1:
        yield f"next call: {outcome['next_call']}"
    if (after := outcome.get("second_start", {})).get("message"):
        yield f"started again: {after['result']}: {after['message']}"
    left = Counter(outcome.get("files", {})) - Counter(usual)
    left += Counter(re.sub(r"\d+", "*", process) for process in outcome.get("processes", ()))
    if left:
        yield "left " + ", ".join(f"{number} `{name}`" for name, number in left.items())


if __name__ == "__main__":
    # Under its own name, so that tasks are the functions of a module that workers can import.
    import faults

    sys.exit(faults.main())
