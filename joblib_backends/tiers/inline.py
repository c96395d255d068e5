"""Batches in the caller's own thread, one after the other: what a plain loop does.

The scheduler submits a batch here when joblib asks for its result, in the thread that asks. So nothing runs before
its turn, nothing runs in another thread, and work too small to distribute costs no hand-over.
"""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import Future

from ..budget import Share, explicit_limits, limited
from ..config import Config
from ..worker import Outcome, run_here
from .base import Tier, Work

__all__ = ["InlineTier"]


class InlineTier(Tier):
    """Runs each batch where its result is asked for."""

    name = "inline"
    shares_memory = True
    runs_in_caller = True

    @classmethod
    def capacity(cls, config: Config) -> int:
        """Return 1: a thread does one thing at a time."""
        return 1

    @classmethod
    def share(cls, config: Config, cores: int) -> Share:
        """Return only what was asked for: a plain loop has all cores for each task; and slots of a Dask cluster."""
        return Share(None if _slots_of(config) is None else cores, explicit_limits(config))

    def __init__(self, config: Config, n_jobs: int) -> None:
        self._outer_task = config.outer_task
        self._n_slots = _slots_of(config)
        self._initializer = functools.partial(config.initializer, *config.initargs) if config.initializer else None

    @property
    def n_slots(self) -> int | None:
        """Return how many slots of a Dask cluster the calls of its batches share, in a task that may use some."""
        return self._n_slots

    def submit(self, work: Work) -> Future[Outcome]:
        """Run a batch now and return its finished future."""
        initializer, self._initializer = self._initializer, None
        future: Future[Outcome] = Future()
        n_slots = work.share.cores
        with (
            limited(work.share.limits) if work.share.limits else contextlib.nullcontext(),
            contextlib.nullcontext() if n_slots is None else self._outer_task.lending(n_slots),
        ):
            future.set_result(run_here(work.function, Share(None, {}), initializer))
        return future

    def outcome(self, future: Future[Outcome]) -> Outcome:
        """Return the outcome of a finished batch."""
        return future.result()

    def abort(self) -> None:
        """Do nothing: what was not asked for never runs."""

    def close(self) -> None:
        """Do nothing: nothing was taken."""


def _slots_of(config: Config) -> int | None:
    return None if config.outer_task is None else config.outer_task.n_slots
