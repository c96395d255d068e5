"""What hybrid says of the calls of one run, gathered in the child process."""

from __future__ import annotations

from typing import Any

#: What of a report is kept; a name that this version's report does not have is left out.
REPORTED = (
    "function", "tier", "reason", "n_jobs", "tasks", "batches", "seconds", "predicted_seconds", "planning_seconds",
    "nbytes_moved", "nbytes_saved",
)  # fmt: skip


class Reports:
    """The reports of the ``Parallel`` calls of a run. ``last_report()`` alone would tell of the last one only.

    A search ends with the refit of its estimator, which may call ``Parallel`` too; its search is what one asks about.
    """

    def __init__(self) -> None:
        from joblib import Parallel

        from joblib_backends import last_report

        self._last_report = last_report
        self._seen: Any = None
        self._gathered: list[Any] = []
        call = Parallel.__call__

        def call_and_gather(parallel: Any, tasks: Any) -> Any:
            output = call(parallel, tasks)
            self._gather()
            return output

        Parallel.__call__ = call_and_gather

    def _gather(self) -> None:
        report = self._last_report()
        if report is not None and report is not self._seen:
            self._seen = report
            self._gathered.append(report)

    def take(self) -> dict[str, Any]:
        """Return the report of the longest call since the last time, and how many calls there were."""
        self._gather()  # a generator of results ends after its Parallel call
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return {}
        longest = max(gathered, key=lambda report: report.seconds)
        return {
            **{name: getattr(longest, name) for name in REPORTED if hasattr(longest, name)},
            "calls": len(gathered),
        }
