"""Timelines in the Chrome trace-event format, which https://ui.perfetto.dev and ``chrome://tracing`` open.

A file is a JSON array with one event on each line, so that calls can be added at its end, and what a killed process
has left can be read. Each call is an event on a row of its own, whose arguments are its report: the file has all that
is needed to make the other forms of it.

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from .model import KINDS, Mark, Row, Span, Timeline

__all__ = ["END", "START", "Tracks", "calls_in", "document_of"]

#: What stands before the first event, between two, and after the last.
START: Final = "[\n"
BETWEEN: Final = ",\n"
END: Final = "\n]\n"

#: The category of the event that is a call, and of marks.
_CALL: Final = "call"
_MARK: Final = "mark"

#: The process and the row of calls.
_CALLS_PID: Final = 1
_CALLS_TID: Final = 0

_Event = dict[str, Any]


class Tracks:
    """The numbers that a file has for hosts and rows, and the moment from which its times are counted."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._tids: dict[Row, int] = {}
        self._started_at: float | None = None
        self._n_calls = 0

    def events_of(self, report: Mapping[str, Any], timeline: Timeline) -> Iterator[str]:
        """Yield the next call of the file, event by event, as lines without an end."""
        call, started_at = self._n_calls, _timestamp(report)
        if self._started_at is None:
            self._started_at = started_at
            yield _line(_name_of("process", _CALLS_PID, _CALLS_TID, "joblib calls"))
            yield _line(_name_of("thread", _CALLS_PID, _CALLS_TID, "calls"))
        self._n_calls += 1
        zero = started_at - self._started_at
        arguments = {"call": call, "report": dict(report), "omitted": timeline.n_omitted}
        name, seconds = str(report.get("function") or "no tasks"), float(report.get("seconds") or 0.0)
        where = (_CALLS_PID, _CALLS_TID)
        yield _line(_complete(name, _CALL, zero, seconds, where, arguments))
        places = []
        for row in timeline.rows:
            yield from self._introduced(row)
            places.append((self._pids[row.host], self._tids[row]))
        for one in timeline.spans:
            arguments = {"call": call, "task": one.task, "tasks": one.n_tasks, "detail": one.detail}
            yield _line(_complete(one.name, one.kind, zero + one.start, one.seconds, places[one.row], arguments))
        for mark in timeline.marks:
            yield _line(_instant(mark, zero, places[mark.row], call))

    def _introduced(self, row: Row) -> Iterator[str]:
        if row.host not in self._pids:
            self._pids[row.host] = _CALLS_PID + 1 + len(self._pids)
            title = f"workers on {row.host}" if row.host else "workers"
            yield _line(_name_of("process", self._pids[row.host], 0, title))
        if row not in self._tids:
            self._tids[row] = len(self._tids) + 1
            yield _line(_name_of("thread", self._pids[row.host], self._tids[row], row.name, host=row.host))


def document_of(calls: Iterable[tuple[Mapping[str, Any], Timeline]]) -> str:
    """Return a whole file of calls, each a report as a dict and its timeline."""
    tracks = Tracks()
    return START + BETWEEN.join(line for call in calls for line in tracks.events_of(*call)) + END


def calls_in(text: str) -> list[tuple[dict[str, Any], Timeline]]:
    """Return the calls of a file, also of one that ends in the midst of an event.

    Raises
    ------
    ValueError
        If it is no trace with calls of this package.
    """
    calls: dict[int, tuple[dict[str, Any], Timeline]] = {}
    rows: dict[tuple[int, int], Row] = {}
    events = _events_in(text)
    for one in events:
        if one.get("cat") == _CALL:
            timeline = Timeline(n_omitted=one["args"].get("omitted", 0))
            calls[one["args"]["call"]] = (one["args"]["report"], timeline)
        elif one.get("ph") == "M" and one.get("name") == "thread_name" and one["pid"] != _CALLS_PID:
            rows[one["pid"], one["tid"]] = Row(one["args"]["name"], one["args"].get("host", ""))
    if not calls:
        raise ValueError("it has no calls of joblib_backends")
    _put_events(events, calls, rows)
    return [calls[position] for position in sorted(calls)]


def _put_events(
    events: Iterable[_Event], calls: Mapping[int, tuple[dict[str, Any], Timeline]], rows: Mapping[tuple[int, int], Row]
) -> None:
    # Calls are written when they end: the first of the file may have begun after others.
    began_at = _timestamp(calls[min(calls)][0])
    positions: dict[tuple[int, Row], int] = {}
    for one in events:
        kind, call = one.get("cat"), one.get("args", {}).get("call")
        row = rows.get((one.get("pid", 0), one.get("tid", 0)))
        if row is None or call not in calls or (kind not in KINDS and kind != _MARK):
            continue
        report, timeline = calls[call]
        position = positions.setdefault((call, row), len(timeline.rows))
        if position == len(timeline.rows):
            timeline.rows.append(row)
        start = one["ts"] * 1e-6 - (_timestamp(report) - began_at)
        if kind == _MARK:
            timeline.marks.append(Mark(position, one["name"], start, one["args"]["detail"]))
        else:
            about = one["args"]
            span = (position, kind, one["name"], start, one["dur"] * 1e-6, about["task"], about["tasks"])
            timeline.spans.append(Span(*span, about["detail"]))


def _events_in(text: str) -> list[_Event]:
    try:
        found = json.loads(text)
        found = found.get("traceEvents", []) if isinstance(found, dict) else found
    except ValueError:
        found = list(_whole_lines(text))
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _whole_lines(text: str) -> Iterator[Any]:
    for line in text.splitlines():
        try:
            yield json.loads(line.rstrip(","))
        except ValueError:
            continue


def _timestamp(report: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(report["started_at"]).timestamp()


def _complete(
    name: str, kind: str, start: float, seconds: float, where: tuple[int, int], arguments: dict[str, Any]
) -> _Event:
    pid, tid = where
    ts, dur = round(start * 1e6, 3), round(seconds * 1e6, 3)
    return {"ph": "X", "name": name, "cat": kind, "ts": ts, "dur": dur, "pid": pid, "tid": tid, "args": arguments}


def _instant(mark: Mark, zero: float, where: tuple[int, int], call: int) -> _Event:
    pid, tid = where
    arguments = {"call": call, "detail": mark.detail}
    ts = round((zero + mark.at) * 1e6, 3)
    return {"ph": "i", "s": "t", "name": mark.name, "cat": _MARK, "ts": ts, "pid": pid, "tid": tid, "args": arguments}


def _name_of(what: str, pid: int, tid: int, name: str, **about: str) -> _Event:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name, **about}}


def _line(event: _Event) -> str:
    return json.dumps(event, separators=(",", ":"), default=str)
