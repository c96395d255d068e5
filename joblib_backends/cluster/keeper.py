"""Keeps the copies of a worker for as long as it has the tasks that made them.

This file travels as its own source (``travel.py``): a worker that joins may run it before it has our package. So it
needs distributed only.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import distributed

__all__ = ["KeepCopies"]


class KeepCopies(distributed.WorkerPlugin):
    """Has what a task has put into ``kept``, by its key, until Dask forgets the task."""

    name = "joblib_backends-copies"
    idempotent = True

    def __init__(self) -> None:
        self.kept: dict[Hashable, Any] = {}

    def transition(self, key: Hashable, start: str, finish: str, **kwargs: Any) -> None:
        """Let go of what belongs to a task that is forgotten; nobody else has it, so its file goes, too."""
        if finish in ("released", "forgotten") and self.kept:
            self.kept.pop(key, None)

    def teardown(self, worker: Any) -> None:
        """Let go of all when the worker ends, and of what neighbours have left that were killed."""
        self.kept.clear()
        store = sys.modules.get("joblib_backends.data.store")
        if store is not None:
            store.sweep_places()
