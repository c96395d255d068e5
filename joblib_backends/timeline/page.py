"""The page of a call: its report and its timeline as one HTML file that needs nothing else, not even a network.

What does not move is written here, so that it can be read without JavaScript; ``page.js`` draws the timeline from
compact columns. Names come from the user's code: they are escaped where they are text, and in the data no character is
left that could end it. A Content-Security-Policy allows the page its own script, no other one, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import accumulate
from typing import Any, Final

from .model import KINDS, Row, Span, Timeline

__all__ = ["page_of"]

#: Marks that are also listed as text; the others are only drawn.
MARKS_LISTED: Final = 200


def page_of(report: Mapping[str, Any], timeline: Timeline) -> str:
    """Return the page of one call.

    Parameters
    ----------
    report : mapping
        What is known of the call, under the names of the report's attributes; also ``started_at`` (a time as ISO 8601
        writes it), ``messages`` (mappings with kind, text, count, task) and ``advice`` (sentences). Unknown names are
        ignored, missing ones and None are left out of the page.
    timeline : Timeline
        Who did what, from when to when.

    Returns
    -------
    str
        An HTML document in which script, style and data are contained.
    """
    known = {name: value for name, value in report.items() if value is not None}
    lanes, extent = _lanes(timeline), _extent(known, timeline)
    script = _asset("page.js")
    parts = {
        "policy": _policy(script),
        "title": _text(_title(known)),
        "heading": _heading(known),
        "plan": _plan(known),
        "advice": _advice(known.get("advice") or ()),
        "tables": _tables(known),
        "summary": _summary(known, timeline),
        "legend": _legend(timeline),
        "rows": _rows(timeline, lanes, extent),
        "marks": _marks(timeline),
        "messages": _messages(known.get("messages") or ()),
        "data": _embedded(_columns(timeline, lanes, extent)),
        "style": _asset("page.css"),
        "script": script,
    }
    # One pass: what looks like a placeholder in a user's name stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


@lru_cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The icon is an empty data: address, or browsers ask the place that the page came from for one.
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"


# ---- the data of the drawing


@dataclass
class _Lane:
    """Spans of one row that do not overlap, by time: a batch lies in the first lane of its row, its phases below."""

    row: int
    spans: list[tuple[int, int, Span]]


def _lanes(timeline: Timeline) -> list[_Lane]:
    """Return the spans with start and end in microseconds, row by row, in as few lanes as there are levels."""
    of_row: defaultdict[int, list[tuple[int, int, Span]]] = defaultdict(list)
    for span in timeline.spans:
        of_row[span.row].append((_microseconds(span.start), _microseconds(span.start + span.seconds), span))
    found = []
    for row, spans in sorted(of_row.items()):
        # Outer spans come first; a batch also where rounding made it start a microsecond after what lies in it.
        spans.sort(key=lambda placed: (placed[0] - (placed[2].n_tasks > 0), -placed[1], -placed[2].n_tasks))
        of_level: list[_Lane] = []
        for placed in spans:
            # The ends of neighbours were rounded, too.
            free = (lane for lane in of_level if lane.spans[-1][1] <= placed[0] + 1)
            lane = next(free, None)
            if lane is None:
                of_level.append(lane := _Lane(row, []))
            lane.spans.append(placed)
        found += of_level
    return found


def _columns(timeline: Timeline, lanes: list[_Lane], extent: tuple[int, int]) -> dict[str, Any]:
    """Return what the script draws: a list for each field of the spans, lane by lane, and each text once."""
    position: dict[str, int] = {"": 0}

    def interned(text: str) -> int:
        return position.setdefault(text, len(position))

    placed = [span for lane in lanes for span in lane.spans]
    columns = {
        "kinds": KINDS,
        "rows": [[interned(row.name), interned(row.host)] for row in timeline.rows],
        "lanes": [[lane.row, len(lane.spans)] for lane in lanes],
        # Differences have fewer digits than times.
        "start": [after[0] - before for lane in lanes for before, after in _with_previous(lane.spans)],
        "took": [end - start for start, end, _ in placed],
        "kind": [KINDS.index(span.kind) for *_, span in placed],
        "name": [interned(span.name) for *_, span in placed],
        "task": [span.task for *_, span in placed],
        "count": [span.n_tasks for *_, span in placed],
        "detail": [interned(span.detail) for *_, span in placed],
        "marks": [
            [mark.row, _microseconds(mark.at), interned(mark.name), interned(mark.detail)]
            for mark in sorted(timeline.marks, key=lambda mark: (mark.row, mark.at))
        ],
        "extent": extent,
    }
    return columns | {"texts": list(position)}


def _with_previous(spans: list[tuple[int, int, Span]]) -> Iterable[tuple[int, tuple[int, int, Span]]]:
    return zip([0, *(start for start, *_ in spans)], spans, strict=False)


def _extent(report: Mapping[str, Any], timeline: Timeline) -> tuple[int, int]:
    """Return when the drawing begins and ends: with the call, or with what a clock put before or after it."""
    moments = [0.0, report.get("seconds", 0.0), *(mark.at for mark in timeline.marks)]
    moments += (moment for span in timeline.spans for moment in (span.start, span.start + span.seconds))
    return _microseconds(min(moments)), _microseconds(max(moments))


def _busy(lanes: list[_Lane]) -> int:
    """Return the microseconds in which something lies in at least one lane of a row."""
    total, until = 0, -1 << 62
    for start, end in sorted((start, end) for lane in lanes for start, end, _ in lane.spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _embedded(data: Mapping[str, Any]) -> str:
    """Return JSON that nothing in it can end, whoever reads it: HTML's parser, or an older one of JavaScript."""
    # ASCII: U+2028 and lone surrogates are escaped already.
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ---- the text of the page


def _title(report: Mapping[str, Any]) -> str:
    return f"{report.get('function') or 'Parallel call'}: timeline"


def _heading(report: Mapping[str, Any]) -> str:
    name = _text(report.get("function") or "Parallel call")
    said = [_counted(report["tasks"], "task")] if "tasks" in report else []
    if "seconds" in report:
        said.append(readable_seconds(report["seconds"]))
    if "started_at" in report:
        moment = _text(report["started_at"])
        readable = re.sub(r"(\d)T(\d\d:\d\d:\d\d).*", r"\1 \2", moment)
        said.append(f'<time datetime="{moment}">{readable}</time>')
    outcome = '<span class="outcome failed">failed</span>' if report.get("failed") else ""
    if report.get("failed") is False:
        outcome = '<span class="outcome">done</span>'
    return f'<h1>{name} {outcome}</h1>\n<p class="facts">{" <i>·</i> ".join(said)}</p>'


def _plan(report: Mapping[str, Any]) -> str:
    if not report.get("tier"):
        return ""
    reason = f": {_text(report['reason'])}" if report.get("reason") else ""
    return f'<p class="plan">Ran on <strong>{_text(report["tier"])}</strong>{reason}</p>'


def _advice(sentences: Iterable[Any]) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<section class="advice" aria-label="Advice"><h2>Advice</h2><ul>{items}</ul></section>' if items else ""


def readable_seconds(seconds: float) -> str:
    """Return a duration in the unit that a person reads it in."""
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    if abs(seconds) < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _nbytes(nbytes: float) -> str:
    power = min((len(f"{abs(nbytes):.0f}") - 1) // 3, 4)
    return f"{nbytes:.0f} B" if not power else f"{nbytes / 1000**power:.3g} {'_kMGT'[power]}B"


def _decimal(value: float) -> str:
    return f"{value:.3g}"


#: The report by heading: name, what it is called, and how its value is written. What is 0 is left out, but for the
#: first of these: it says something that nothing was lost.
_TABLES: Final[tuple[tuple[str, tuple[tuple[str, str, Callable[[Any], str]], ...]], ...]] = (
    (
        "Time",
        (
            ("seconds", "from start to end", readable_seconds),
            ("predicted_seconds", "predicted", readable_seconds),
            ("busy_seconds", "sum over the batches", readable_seconds),
            ("speed_up", "speed-up", lambda value: f"{value:.3g} times"),
            ("cores_used", "cores used on average", _decimal),
            ("queue_seconds", "waiting and on their way", readable_seconds),
            ("encode_seconds", "encoding batches", readable_seconds),
            ("load_seconds", "loading batches", readable_seconds),
            ("pack_seconds", "packing results", readable_seconds),
            ("decode_seconds", "decoding results", readable_seconds),
        ),
    ),
    (
        "Work",
        (
            ("tasks", "tasks", str),
            ("batches", "batches", str),
            ("n_jobs", "jobs at once", str),
            ("tasks_restored", "tasks from the checkpoint", str),
            ("retries", "batches run again", str),
            ("lost_workers", "workers lost", str),
        ),
    ),
    (
        "Data",
        (
            ("nbytes_moved", "placed where workers read it", _nbytes),
            ("nbytes_saved", "not moved again", _nbytes),
            ("nbytes_pickled", "pickled with the batches", _nbytes),
            ("nbytes_results", "results", _nbytes),
            ("peak_nbytes", "most memory in use", _nbytes),
        ),
    ),
    (
        "Shared work",
        (
            ("fits_run", "common fits run", str),
            ("fits_shared", "fits shared instead", str),
            ("transforms_run", "common transforms run", str),
            ("transforms_shared", "transforms shared instead", str),
            ("seconds_saved", "time saved", readable_seconds),
        ),
    ),
)


def _tables(report: Mapping[str, Any]) -> str:
    written = []
    for caption, lines in _TABLES:
        cells = [
            f'<tr><th scope="row">{label}</th><td data-name="{name}">{_text(readable(report[name]))}</td></tr>'
            for name, label, readable in lines
            if report.get(name)
        ]
        if cells:
            written.append(f"<table><caption>{caption}</caption><tbody>{''.join(cells)}</tbody></table>")
    return "\n".join(written)


def _summary(report: Mapping[str, Any], timeline: Timeline) -> str:
    """Return the line of counts; it says what the timeline does not hold."""
    n_batches = sum(span.n_tasks > 0 for span in timeline.spans)
    shown = n_tasks(timeline)
    tasks = report.get("tasks", shown)
    text = f'<span id="n-tasks">{tasks}</span> {"task" if tasks == 1 else "tasks"}, '
    text += f"{_counted(n_batches, 'batch')}, {_counted(len(timeline.spans) - n_batches, 'phase')} "
    text += f"on {_counted(len(timeline.rows), 'row')}"
    if timeline.n_omitted:
        text += f"; {timeline.n_omitted} batches more were not recorded"
    elif shown != tasks:
        text += f"; {_counted(shown, 'task')} in the timeline"
    return text


def _counted(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def n_tasks(timeline: Timeline) -> int:
    """Return how many tasks the timeline shows, each once, however often it ran."""
    batches = [span for span in timeline.spans if span.n_tasks]
    intervals = sorted((span.task, span.task + span.n_tasks) for span in batches if span.task >= 0)
    # Where each interval goes beyond all before it.
    reached = list(accumulate((end for _, end in intervals), max, initial=0))
    known = sum(max(0, end - max(first, before)) for (first, end), before in zip(intervals, reached, strict=False))
    return known + sum(span.n_tasks for span in batches if span.task < 0)


def _legend(timeline: Timeline) -> str:
    seconds: defaultdict[str, float] = defaultdict(float)
    for span in timeline.spans:
        seconds[span.kind] += span.seconds
    items = [
        f'<li><button type="button" data-kind="{number}" aria-pressed="true"><i class="kind-{number}"></i>'
        f"{kind} <small>{readable_seconds(seconds[kind])}</small></button></li>"
        for number, kind in enumerate(KINDS)
        if kind in seconds
    ]
    items.append('<li><span><i class="idle"></i>idle</span></li>')
    if timeline.marks:
        items.append(f'<li><span><i class="mark"></i>events <small>{len(timeline.marks)}</small></span></li>')
    return "".join(items)


def _rows(timeline: Timeline, lanes: list[_Lane], extent: tuple[int, int]) -> str:
    begin, end = extent
    of_row: defaultdict[int, list[_Lane]] = defaultdict(list)
    for lane in lanes:
        of_row[lane.row].append(lane)
    return "".join(
        _row(row, len(of_row[number]), _busy(of_row[number]) / max(1, end - begin))
        for number, row in enumerate(timeline.rows)
    )


def _row(row: Row, n_lanes: int, busy: float) -> str:
    name, host, percent = _text(row.name), _text(row.host), f"{100 * busy:.0f}&#8239;%"
    where = f" <small>{host}</small>" if host else ""
    title = f"{name} on {host}" if host else name
    # The scheme of an address takes the room of what tells it from the next one.
    name = re.sub(r"\b[a-z]+:/{2}", "", name)
    tall = ' class="tall"' if n_lanes > 1 else ""
    return (
        f'<li{tall} style="--lanes:{max(1, n_lanes)};--busy:{100 * busy:.1f}%" title="{title}">'
        f'<b>{name}{where}</b><span class="busy">{percent}<span class="unseen"> busy</span></span></li>'
    )


def _marks(timeline: Timeline) -> str:
    marks = sorted(timeline.marks, key=lambda mark: mark.at)
    lines = [
        f"<tr><td>{readable_seconds(mark.at)}</td><td>{_text(timeline.rows[mark.row].name)}</td>"
        f"<td>{_text(mark.name)}</td><td>{_text(mark.detail)}</td></tr>"
        for mark in marks[:MARKS_LISTED]
    ]
    more = f"<p>{len(marks) - MARKS_LISTED} more are in the timeline.</p>" if len(marks) > MARKS_LISTED else ""
    return _listed("Events", ("after", "where", "what", "detail"), lines) + more


def _messages(messages: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        f"<tr><td>{_text(message.get('kind', ''))}</td><td>{_text(message.get('text', ''))}</td>"
        f"<td>{_text(message.get('count', 1))}</td><td>{_text(_task(message.get('task')))}</td></tr>"
        for message in messages
    ]
    return _listed("What tasks said", ("kind", "text", "times", "first by task"), lines)


def _task(task: Any) -> Any:
    return "" if task is None or task == -1 else task


def _listed(heading: str, columns: Iterable[str], lines: list[str]) -> str:
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<section class="list"><h2>{heading}</h2><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></section>"
    )


def _text(value: Any) -> str:
    """Return ``value`` as HTML writes it; a name of a file may hold half a character, which UTF-8 cannot."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())
