"""What to change, by the figures of a call that is over. Pure: a report in, sentences out.

Each rule looks at one thing that takes time it need not take, says how much of the call that was, and what to do. The
two that cost most are said. A call that went well gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from .report import CallReport
from .wording import readable_nbytes, readable_seconds

__all__ = ["advice_for"]

#: Sentences that are given at most: who reads five does none of them.
_MOST: Final = 2

#: Seconds of a call below which nothing is worth a change.
_SHORT_S: Final = 0.2

#: Part of a call's seconds from which on something is worth a word.
_MUCH: Final = 0.25


class _Finding(NamedTuple):
    #: The part of the call's seconds that it took.
    part: float
    sentence: str


def advice_for(report: CallReport) -> tuple[str, ...]:
    """Return at most two sentences on what to change, that which costs most first."""
    if report.seconds < _SHORT_S or not report.batches or report.failed:
        return ()
    found = [finding for rule in _RULES for finding in rule(report)]
    return tuple(one.sentence for one in sorted(found, key=lambda one: -one.part)[:_MOST])


def _of_call(report: CallReport, seconds: float) -> float:
    """Return which part of the call so many seconds of its batches were, which ran beside each other."""
    return seconds / max(1.0, report.speed_up) / report.seconds


def _tiny_tasks(report: CallReport) -> Iterator[_Finding]:
    n_run = report.tasks - report.tasks_restored
    task_s = (report.busy_seconds - report.load_seconds - report.pack_seconds) / max(1, n_run)
    alone_s = task_s * n_run
    # Where nothing was on its way, the call waited for its input, or for who takes the results.
    if report.active_seconds > max(1.25 * alone_s, _MUCH * report.seconds) and task_s < 1e-3 and n_run > report.n_jobs:
        yield _Finding(
            1 - alone_s / report.seconds,
            f"Tasks of {readable_seconds(task_s)} are shorter than it takes to hand them out: a plain loop (n_jobs=1) "
            "is faster, and so is more work in each task.",
        )


def _costly_to_send(report: CallReport) -> Iterator[_Finding]:
    part = report.encode_seconds / report.seconds
    if part > _MUCH and report.nbytes_moved > report.nbytes_pickled:
        yield _Finding(
            part,
            f"{part:.0%} of the time went into placing {readable_nbytes(report.nbytes_moved)} where workers read it: "
            "calls on the same data in one with block place it once.",
        )
    elif part > _MUCH:
        what = report.costly_argument or "the tasks' arguments"
        remedy = "pass it in scatter=[...]"
        if not report.costly_argument:
            remedy = "pass less, what they are made from, or what they have in common in scatter=[...]"
        yield _Finding(part, f"{part:.0%} of the time went into pickling {what}: {remedy}.")


def _costly_to_load(report: CallReport) -> Iterator[_Finding]:
    part = report.load_seconds / max(report.busy_seconds, 1e-9)
    if part > _MUCH and _of_call(report, report.load_seconds) > _MUCH:
        yield _Finding(
            _of_call(report, report.load_seconds),
            f"{part:.0%} of the tasks' time went into unpickling their arguments: NumPy arrays, pandas and Arrow "
            "tables are mapped instead, and larger tasks unpickle less often.",
        )


def _costly_results(report: CallReport) -> Iterator[_Finding]:
    part = report.decode_seconds / report.seconds + _of_call(report, report.pack_seconds)
    if part > _MUCH and report.nbytes_results:
        yield _Finding(
            part,
            f"{part:.0%} of the time went into {readable_nbytes(report.nbytes_results)} of results: return less, such "
            "as a score in the place of a model, or write results to files in the tasks.",
        )


def _too_many_threads(report: CallReport) -> Iterator[_Finding]:
    threads = report.cpu_seconds / max(report.busy_seconds, 1e-9)
    at_once = min(report.n_jobs, max(1.0, report.speed_up))
    kept_waiting = report.delay_seconds / max(report.busy_seconds, 1e-9)
    if threads > 1.5 and at_once > 1.5 and threads * at_once > 0.9 * report.cores and kept_waiting > 0.1:
        yield _Finding(
            _of_call(report, report.delay_seconds),
            f"BLAS or OpenMP used {threads:.1f} threads in each of {at_once:.0f} tasks at once, on {report.cores} "
            "cores: leave inner_max_num_threads out, or set it to 1.",
        )


def _busy_machine(report: CallReport) -> Iterator[_Finding]:
    kept_waiting = report.delay_seconds / max(report.busy_seconds, 1e-9)
    used = report.cores_used
    is_much = kept_waiting > _MUCH and _of_call(report, report.delay_seconds) > _MUCH
    if is_much and used < 0.75 * min(report.n_jobs, report.cores):
        yield _Finding(
            _of_call(report, report.delay_seconds),
            f"Tasks were ready and waited for a core {kept_waiting:.0%} of their time, while they used {used:.1f} of "
            f"{report.cores}: other programs are using this machine.",
        )


def _one_long_task(report: CallReport) -> Iterator[_Finding]:
    part = report.longest_seconds / report.seconds
    at_once = report.speed_up
    jobs = min(report.n_jobs, report.cores or report.n_jobs)
    if report.batches > jobs and part > 0.5 and at_once < 0.6 * jobs:
        yield _Finding(
            part - 1 / jobs,
            f"The batch that begins with task {report.longest_task} took {readable_seconds(report.longest_seconds)} of "
            f"the call's {readable_seconds(report.seconds)}, with {at_once:.1f} batches at once on average: begin with "
            "what takes longest, or split it.",
        )


def _gil(report: CallReport) -> Iterator[_Finding]:
    jobs = min(report.n_jobs, report.cores)
    is_threads = report.tier == "threads" and "asked for" in report.reason
    runs_at_once = report.speed_up > 0.8 * jobs
    # Who waits for the lock is not ready to run, and a thread that a busy machine keeps waiting is.
    used = (report.cpu_seconds + report.delay_seconds) / report.seconds
    if is_threads and jobs > 1 and runs_at_once and 0.7 < used < 0.6 * jobs + 0.1:
        yield _Finding(
            1 - used / jobs,
            f"Threads used {used:.1f} of {jobs} cores, as Python code does that holds the interpreter lock: leave the "
            "tier to tier='auto', or ask for tier='processes'.",
        )


def _lost_workers(report: CallReport) -> Iterator[_Finding]:
    if report.lost_workers:
        yield _Finding(
            1.0,
            f"{report.lost_workers} workers died over batches of the call: if memory ran out, use fewer n_jobs or "
            "smaller tasks.",
        )


_RULES: Final[tuple[Callable[[CallReport], Iterator[_Finding]], ...]] = (
    _tiny_tasks,
    _costly_to_send,
    _costly_to_load,
    _costly_results,
    _too_many_threads,
    _busy_machine,
    _one_long_task,
    _gil,
    _lost_workers,
)
