"""How does ``auto`` scale beyond the cores of this machine? Real tasks, recorded once, replayed on simulated cores.

``record`` runs code as users write it, one task after the other (``recording.py``), and keeps what each took alone,
with one thread per numerical library, and what the backend finds out about the call: whether it may run on threads,
and how many bytes it works on.

``replay`` sends them through the real planner and budget on 2 to 64 simulated cores; ``simulation.py`` says what of
that is simulated and what is not. It reads the recorded file only, and its answer is the same each time.

Usage: ``python benchmarks/scaling.py record [--only WORD]``, ``python benchmarks/scaling.py replay [--save]``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Final, NamedTuple

from layout import markdown_table, seconds
from machine import describe_machine, machine_line
from simulated_machine import Kind, Task
from simulation import STARTUP_S, Replayed, Setting, repeated, replay

RECORDED: Final = Path(__file__).parent / "results" / "scaling.json"

CORES: Final = (2, 4, 16, 64)

#: A ratio to the best fixed choice above this is listed by itself.
BAD: Final = 1.3

#: What a call may lose where a loop wins (issue 3): its ratio says little.
_NEGLIGIBLE_S: Final = 5e-4

LOOP: Final = "plain loop"
_TIERS: Final = ("threads", "processes")


class Line(NamedTuple):
    """What was simulated of a kind in a setting."""

    kind: Kind
    setting: Setting
    #: Seconds with the choice that the name says.
    fixed: dict[str, float]
    #: Nothing known of the kind; known from a first, cold call.
    new: Replayed
    known: Replayed

    @property
    def best(self) -> str:
        """The fastest choice by hand."""
        return min(self.fixed, key=lambda name: self.fixed[name])

    @property
    def allowed(self) -> str:
        """The fastest choice by hand that the planner may make, too: not the user's own code on threads."""
        may_use_threads = self.kind.trusted or self.kind.require is not None
        names = [name for name in self.fixed if name != "threads" or may_use_threads]
        return min(names, key=lambda name: self.fixed[name])

    def ratio(self, auto: Replayed) -> float:
        """Return the time on auto against the best choice by hand."""
        return auto.seconds / self.fixed[self.best]

    def is_bad(self, auto: Replayed) -> bool:
        """Return whether auto lost more than is to be shrugged off."""
        return self.ratio(auto) > BAD and auto.seconds - self.fixed[self.best] > _NEGLIGIBLE_S


def simulate(kind: Kind, setting: Setting) -> Line:
    """Return a line of the table."""
    first = replay(kind, Setting(setting.cores, is_warm=False))
    fixed = {LOOP: kind.loop_seconds(setting.cores)}
    for tier in _TIERS:
        if kind.require is None or tier == "threads":
            fixed[tier] = replay(kind, setting, tier).seconds
    return Line(kind, setting, fixed, replay(kind, setting), replay(kind, setting, known=first.experience))


# ---- the report


def report(document: dict[str, Any], kinds: dict[str, Kind]) -> str:
    """Return the whole report."""
    parts = ["## scaling (simulated)", *_about(document), kinds_table(document, kinds)]
    for times, title in ((1, "as recorded"), (10, "ten times the tasks")):
        for is_warm, state in ((True, "warm"), (False, "cold")):
            calls = [repeated(kind, times) for kind in kinds.values()]
            lines = [simulate(call, Setting(cores, is_warm)) for call in calls for cores in CORES]
            parts += [f"### {title.capitalize()}, {state}", times_table(lines), summary_table(lines), *_bad(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(document: dict[str, Any]) -> Iterable[str]:
    yield f"Tasks recorded on: {machine_line(document['machine'])}"
    yield (
        "Replayed through the real `CallPlanner` and `cores_for_batch` on simulated cores; `simulation.py` says what "
        "is not simulated, memory bandwidth most of all. *Fixed*: a choice by hand, with the same batches and prices. "
        "Threads are shown where the planner may not use them, too (*untrusted*: the user's own code); the plain loop "
        f"has all cores inside a task. *Cold*: process workers are there {seconds(STARTUP_S)} after they are asked "
        "for, and the data is not. *New*: nothing is known of the kind of task; *known*: after one cold call. "
        "*Limit*: all CPU work over the cores, or the longest task."
    )
    yield (
        "GIL: the part of its time for which a task holds it; two copies: how much longer two take on two threads than "
        "one; OpenMP: the part of its time that threads inside divide. The machine did other work while this was "
        "recorded, which the times leave out; the shares are rough, most of all of tasks that let go of the GIL often."
    )


def kinds_table(document: dict[str, Any], kinds: dict[str, Kind]) -> str:
    """Return what was recorded."""
    head = ("kind", "what", "threads", "tasks", "seconds alone", "longest", "CPU", "data", "GIL", "2 copies", "OpenMP")
    lines = [_recorded(kind, document["kinds"][name]) for name, kind in kinds.items()]
    return markdown_table(head, lines, n_text_columns=3)


def _recorded(kind: Kind, entry: dict[str, Any]) -> tuple[str, ...]:
    wall_s, cpu_s = (sum(task[column] for task in kind.tasks) for column in (0, 1))
    allowed = "required" if kind.require else "trusted" if kind.trusted else "not trusted"
    return (
        kind.name,
        entry["about"],
        allowed,
        str(len(kind.tasks)),
        seconds(wall_s),
        seconds(max(task.wall_s for task in kind.tasks)),
        f"{cpu_s / wall_s:.2f}",
        f"{kind.nbytes / 1e6:.1f} MB",
        f"{kind.gil_share:.2f}",
        f"{entry['two_copies']:.2f}",
        f"{kind.parallel_fraction:.2f}" if kind.parallel_fraction else "",
    )


def times_table(lines: Sequence[Line]) -> str:
    """Return the seconds of each choice, the ratios, and the speed-up."""
    head = ("kind", "cores", LOOP, *_TIERS, "auto, new", "auto, known", "new / best", "known / best")
    return markdown_table((*head, "loop / new", "loop / known", "limit"), [_times(line) for line in lines])


def _times(line: Line) -> tuple[str, ...]:
    cells = (_cell(line, name) for name in (LOOP, *_TIERS))
    autos = (line.new, line.known)
    return (
        line.kind.name,
        str(line.setting.cores),
        *cells,
        *(seconds(auto.seconds) for auto in autos),
        *(f"{line.ratio(auto):.2f}" for auto in autos),
        *(f"{line.fixed[LOOP] / auto.seconds:.2f}" for auto in autos),
        seconds(line.kind.limit_seconds(line.setting.cores)),
    )


def _cell(line: Line, name: str) -> str:
    text = seconds(line.fixed[name]) if name in line.fixed else ""
    return f"**{text}**" if name == line.best else text


def summary_table(lines: Sequence[Line]) -> str:
    """Return, for each number of cores, the worst ratio and the geometric means."""
    head = (
        "cores",
        "worst new / best",
        "where",
        "mean",
        "worst known / best",
        "where",
        "mean",
        "mean known / allowed",
        "mean loop / known",
    )
    return markdown_table(head, [_summary(lines, cores) for cores in CORES])


def _summary(lines: Sequence[Line], cores: int) -> tuple[str, ...]:
    here = [line for line in lines if line.setting.cores == cores]
    cells = [str(cores)]
    choices: tuple[Callable[[Line], Replayed], ...] = (lambda line: line.new, lambda line: line.known)
    for auto in choices:
        worst = max(here, key=lambda line: line.ratio(auto(line)))
        mean = geometric_mean(line.ratio(auto(line)) for line in here)
        cells += [f"{worst.ratio(auto(worst)):.2f}", worst.kind.name, f"{mean:.2f}"]
    speed_up = geometric_mean(line.fixed[LOOP] / line.known.seconds for line in here)
    allowed = geometric_mean(line.known.seconds / line.fixed[line.allowed] for line in here)
    return (*cells, f"{allowed:.2f}", f"{speed_up:.2f}")


def _bad(lines: Sequence[Line]) -> Iterable[str]:
    """Yield the calls in which auto lost most, with what it chose."""
    head = ("kind", "cores", "best", "best s", "new / best", "known / best", "known / allowed", "new ran", "known ran")
    found = [
        (
            line.kind.name,
            str(line.setting.cores),
            line.best if line.best == line.allowed else f"{line.best}, untrusted",
            seconds(line.fixed[line.best]),
            f"{line.ratio(line.new):.2f}",
            f"{line.ratio(line.known):.2f}",
            f"{line.known.seconds / line.fixed[line.allowed]:.2f}",
            _where(line.new),
            _where(line.known),
        )
        for line in lines
        if line.is_bad(line.new) or line.is_bad(line.known)
    ]
    if found:
        yield f"More than {BAD} times the best choice by hand, and more than {seconds(_NEGLIGIBLE_S)} lost:"
        yield markdown_table(head, found)


def _where(auto: Replayed) -> str:
    return ", ".join(f"{n_tasks} {tier}" for tier, n_tasks in auto.n_tasks.items())


# ---- the file


def load() -> tuple[dict[str, Any], dict[str, Kind]]:
    """Return the recorded document and its calls."""
    document = json.loads(RECORDED.read_text())
    return document, {name: _kind(name, entry) for name, entry in document["kinds"].items()}


def _kind(name: str, entry: dict[str, Any]) -> Kind:
    tasks = tuple(Task(wall_s, cpu_s) for n_tasks, wall_s, cpu_s in entry["tasks"] for _ in range(int(n_tasks)))
    shares = entry["gil_share"], entry["parallel_fraction"]
    return Kind(name, tasks, entry["trusted_on_threads"], entry["require"], entry["nbytes"], *shares)


def record_all(only: str) -> None:
    """Measure the kinds whose name holds ``only``; others keep what was recorded of them."""
    from recording import SOURCES, record  # a replay needs no scikit-learn

    document = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"kinds": {}}
    document["machine"] = machine = describe_machine()
    for name in (name for name in SOURCES if only in name):
        entry = {"recorded": machine["date"], "load_average": round(machine["load_average"], 2)}
        document["kinds"][name] = {**record(SOURCES[name]), **entry}
        print(name, {key: value for key, value in document["kinds"][name].items() if key != "tasks"}, flush=True)
    document["kinds"] = {name: document["kinds"][name] for name in SOURCES if name in document["kinds"]}
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(_as_text(document))


def _as_text(document: dict[str, Any]) -> str:
    """Return the document as JSON, each task on a line of its own."""
    text = json.dumps(document, indent=1)
    return text.replace("[\n     ", "[").replace(",\n     ", ", ").replace("\n    ]", "]") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or replay."""
    parser = argparse.ArgumentParser(description="Replay recorded tasks through the planner on simulated cores.")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="measure real tasks, alone")
    recording.add_argument("--only", default="", metavar="WORD", help="kinds whose name holds the word")
    replaying = commands.add_parser("replay", help="simulate what was recorded")
    replaying.add_argument("--save", action="store_true", help="also write results/scaling.md")
    options = parser.parse_args(arguments)
    if options.command == "record":
        record_all(options.only)
        return 0
    text = report(*load())
    print(text, end="")
    if options.save:
        RECORDED.with_suffix(".md").write_text(text)
        print(f"Saved {RECORDED.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
