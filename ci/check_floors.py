"""Check that every file of the package imports only from lower floors, and that there is no import cycle.

Imports inside functions and under ``TYPE_CHECKING`` count: a lazy import hides a wrong direction, it does not
mend it. Only the tier table, which loads a tier by its name, reaches upwards, without an import statement.

Usage: ``python ci/check_floors.py``; prints one line per violation and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "joblib_backends"

#: From the ground up. Files on one line share a floor and may not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("version.py", "timeline/__init__.py", "timeline/model.py", "messages.py"),
    ("timeline/phases.py", "timeline/clocks.py", "timeline/page.py", "hearing.py"),
    ("errors.py",),
    ("config.py",),
    ("crew.py", "memory.py"),
    ("budget.py",),
    ("thread_safety.py",),
    ("data/hashing.py",),
    ("data/store.py",),
    ("data/scope.py",),
    ("data/values.py",),
    ("data/files.py",),
    ("data/arrays.py",),
    ("data/pickler.py", "data/content.py"),
    ("data/costs.py",),
    ("data/shelf.py",),
    ("data/codec.py",),
    ("data/__init__.py",),
    ("worker.py",),
    ("timeline/recorder.py",),
    ("remote.py",),
    (
        *("cluster/__init__.py", "cluster/client.py", "cluster/abroad.py", "cluster/versions.py"),
        *("cluster/accounting.py", "cluster/keeper.py", "cluster/sklearn_transport.py", "cluster/outer_task.py"),
    ),
    ("cluster/travel.py", "cluster/ticket.py"),
    ("cluster/delivery.py",),
    ("cluster/losses.py", "cluster/placement.py", "cluster/copies.py", "cluster/outlet.py", "cluster/relay.py"),
    ("cluster/spread.py", "cluster/outfit.py"),
    ("cluster/places.py", "cluster/local.py", "cluster/local_host.py"),
    ("cluster/running.py", "cluster/flight.py", "cluster/address.py"),
    ("cluster/sender.py", "cluster/fetching.py"),
    ("cluster/collector.py",),
    ("cluster/exchange.py",),
    ("cluster/connection.py",),
    ("workers/__init__.py", "workers/frames.py", "workers/preparation.py", "workers/preload.py"),
    ("workers/main.py",),
    ("workers/forking.py",),
    ("workers/server.py",),
    ("workers/process.py",),
    ("workers/calls.py",),
    ("workers/member.py", "workers/completions.py"),
    ("workers/roster.py", "workers/collector.py", "workers/starter.py"),
    ("workers/core.py",),
    ("workers/pool.py",),
    ("tiers/base.py",),
    ("tiers/inline.py", "tiers/threads.py", "tiers/processes.py", "tiers/dask.py", "tiers/fake.py"),
    ("tiers/__init__.py",),
    ("experience.py",),
    ("rules.py",),
    ("planner.py",),
    ("profile.py",),
    ("kinds.py",),
    ("pilot.py",),
    ("wording.py",),
    ("timeline/chrome.py",),
    ("timeline/trace_file.py",),
    ("report.py",),
    ("advice.py", "tally.py"),
    ("router.py",),
    ("sharing/__init__.py", "sharing/ledger.py", "sharing/warned.py", "sharing/sklearn_inside.py"),
    ("sharing/steps.py", "sharing/effects.py"),
    ("sharing/task.py",),
    ("sharing/call.py",),
    ("checkpoint/__init__.py", "checkpoint/private.py", "checkpoint/modules.py"),
    ("checkpoint/database.py",),
    ("checkpoint/journal.py",),
    ("checkpoint/code.py",),
    ("checkpoint/identity.py",),
    ("checkpoint/call.py",),
    ("batches.py",),
    ("labels.py", "progress.py", "retelling.py"),
    ("recovery.py", "completer.py", "opening.py", "allotment.py"),
    ("rescue.py",),
    ("randomness.py",),
    ("relief.py",),
    ("scheduler.py",),
    ("context.py",),
    ("backend.py",),
    ("activation.py", "outlook.py"),
    ("surroundings.py",),
    ("__init__.py",),
    ("command_line.py",),
    ("__main__.py",),
)

#: Files that gather the public names: they may import from every floor.
ANY_FLOOR = frozenset({"__init__.py"})


def main(package: Path = PACKAGE) -> int:
    """Print the violations of ``package``; return 1 if there are any, else 0."""
    found = violations(package)
    for line in found:
        print(line)
    if not found:
        print(f"floors: {len(list(package.rglob('*.py')))} files import only from lower floors.")
    return int(bool(found))


def violations(package: Path, floors: tuple[tuple[str, ...], ...] = FLOORS) -> list[str]:
    """Return one line for each import that breaks the order of ``floors``, and one for an import cycle."""
    floor_of = {name: floor for floor, names in enumerate(floors) for name in names}
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    if not files:
        return [f"{package}: holds no Python file, so nothing was checked."]
    found = []
    graph: dict[str, set[str]] = {}
    for name in files:
        if name not in floor_of:
            found.append(f"{name}: is not in the table of floors; add it to FLOORS in ci/check_floors.py.")
        graph[name] = set()
        for line, target in _imports(package, name):
            graph[name].add(target)
            if target not in files:
                found.append(f"{name}:{line}: imports {target}, which does not exist.")
            elif name in ANY_FLOOR or not {name, target} <= floor_of.keys():
                continue
            elif floor_of[target] >= floor_of[name]:
                found.append(f"{name}:{line}: imports {target}, which is not on a lower floor.")
    return found + _cycle(graph)


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"import cycle: {' <- '.join(error.args[1])}."]
    return []


def _imports(package: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield (line, file) for everything that the file ``name`` imports from its own package."""
    tree = ast.parse((package / name).read_text(encoding="utf-8"), filename=name)
    here = Path(name).parent.parts
    for node in ast.walk(tree):
        for target in _targets(node, package.name, here):
            yield node.lineno, _file(package, target)  # type: ignore[attr-defined]


def _targets(node: ast.AST, package: str, here: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the dotted path below the package of each module, or name in a module, that ``node`` imports."""
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        # One dot is the file's own package, each further dot one package up.
        parents = (package, *here)[: len(here) + 2 - node.level] if node.level else ()
        dotted = [".".join(filter(None, (*parents, node.module, alias.name))) for alias in node.names]
    elif isinstance(node, ast.Call) and _is_import_call(node) and isinstance(node.args[0], ast.Constant):
        text = str(node.args[0].value)
        dotted = [".".join((package, *here, text[1:])) if text.startswith(".") else text]
    else:
        return
    for path in dotted:
        first, *rest = path.split(".")
        if first == package:
            yield tuple(rest)


def _is_import_call(node: ast.Call) -> bool:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called in {"import_module", "__import__"} and bool(node.args)


def _file(package: Path, target: tuple[str, ...]) -> str:
    """Return the file that defines ``target``: the module itself, or the module that holds the name."""
    for path in (target, target[:-1]):
        for candidate in ("/".join(path) + ".py", "/".join((*path, "__init__.py"))):
            if (package / candidate).is_file():
                return candidate
    return "/".join(target[:-1] or target) + ".py"


if __name__ == "__main__":
    sys.exit(main())
