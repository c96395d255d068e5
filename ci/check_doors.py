"""Check the one-door rules: what only one file of the package may name, and what importing it must not load.

A dependency that is touched in one file can be followed when it changes; one that is touched in ten cannot.

Usage: ``python ci/check_doors.py``; prints one line per violation and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "joblib_backends"

#: Modules that ``import joblib_backends`` must not load: they cost seconds, and most are optional.
NOT_LOADED = ("sklearn", "dask", "distributed", "pandas")

#: Attributes of a stream that write nothing.
_HARMLESS = frozenset({"flush", "fileno", "isatty"})
_ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"})
_STREAMS = frozenset({"stdout", "stderr", "__stdout__", "__stderr__"})

#: What a rule finds in a file: (line, what was named there).
Finder = Callable[[ast.Module], Iterator[tuple[int, str]]]


@dataclass(frozen=True)
class Door:
    """Something that only the files ``doors`` may touch."""

    what: str
    doors: tuple[str, ...]
    find: Finder


@dataclass(frozen=True)
class Imported:
    """One name that an import statement binds, with the dotted path of what it stands for."""

    line: int
    path: str
    bound: str


def main(package: Path = PACKAGE) -> int:
    """Print the violations of ``package``; return 1 if there are any, else 0."""
    found = violations(package) + loaded_on_import(package)
    for line in found:
        print(line)
    if not found:
        unwanted = ", ".join(NOT_LOADED)
        print(f"doors: {len(RULES)} rules hold, and importing {package.name} loads none of {unwanted}.")
    return int(bool(found))


def violations(package: Path) -> list[str]:
    """Return one line for each place that touches what belongs to another file."""
    files = sorted(package.rglob("*.py"))
    if not files:
        return [f"{package}: holds no Python file, so nothing was checked."]
    found = []
    for path in files:
        name = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=name)
        for rule in RULES:
            if name not in rule.doors:
                found += [
                    f"{name}:{line}: {named} ({rule.what}) belongs in {' or '.join(rule.doors)} only."
                    for line, named in sorted(set(rule.find(tree)))
                ]
    return found


def loaded_on_import(package: Path, unwanted: tuple[str, ...] = NOT_LOADED) -> list[str]:
    """Return one line for each module of ``unwanted`` that ``import package`` loads in a new interpreter."""
    if not (package / "__init__.py").is_file():
        return [f"{package}: has no __init__.py, so importing it shows nothing."]
    program = (
        f"import json, sys; sys.path.insert(0, {str(package.parent)!r}); import {package.name}; "
        f"print(json.dumps(sorted(set({unwanted!r}) & set(sys.modules))))"
    )
    # The environment can activate the backend when the interpreter starts, which would be what is measured.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB_BACKEND")}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if run.returncode:
        return [f"import {package.name} fails: {run.stderr.strip().splitlines()[-1]}"]
    return [
        f"import {package.name} loads {module}; import it inside the function that needs it."
        for module in json.loads(run.stdout.splitlines()[-1])
    ]


def private_joblib_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find joblib's underscore modules and names, and underscore attributes of what came from joblib."""
    from_joblib = {"parallel"}  # Also the usual name of a joblib.Parallel that was handed over.
    for imported in _imports(tree):
        if imported.path.split(".")[0] == "joblib":
            from_joblib.add(imported.bound)
            if any(map(_is_private, imported.path.split("."))):
                yield imported.line, imported.path
    for node in ast.walk(tree):
        attribute = _attribute(node)
        if attribute and _is_private(attribute[1]) and from_joblib & _owners(attribute[0]):
            yield node.lineno, f"{ast.unparse(attribute[0])}.{attribute[1]}"  # type: ignore[attr-defined]


def imports_of(*packages: str) -> Finder:
    """Return a finder of imports of ``packages`` and of anything below them."""

    def find(tree: ast.Module) -> Iterator[tuple[int, str]]:
        for imported in _imports(tree):
            if any(f"{imported.path}.".startswith(f"{package}.") for package in packages):
                yield imported.line, imported.path

    return find


def environment_access(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find reads and writes of environment variables."""
    return _members_of(tree, "os", _ENVIRONMENT)


def printing(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find print and every use of the standard streams that can write to them."""
    harmless = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _HARMLESS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield node.lineno, "print"
    yield from _members_of(tree, "sys", _STREAMS, harmless)


RULES = (
    Door("joblib's private names", ("backend.py",), private_joblib_names),
    # The demo is a user's program, a grid search; it imports scikit-learn in the function that runs it.
    Door(
        "scikit-learn",
        ("sharing/sklearn_inside.py", "cluster/sklearn_transport.py", "__main__.py"),
        imports_of("sklearn"),
    ),
    Door("loky", ("workers/process.py",), imports_of("loky", "joblib.externals.loky")),
    # What a Dask worker may be without.
    Door("tqdm", ("progress.py",), imports_of("tqdm")),
    Door("xxhash", ("data/hashing.py",), imports_of("xxhash")),
    Door("threadpoolctl", ("budget.py", "workers/preparation.py"), imports_of("threadpoolctl")),
    Door(
        "the inside of multiprocessing",
        ("workers/process.py", "workers/server.py", "workers/forking.py", "workers/preparation.py"),
        imports_of(
            *(f"multiprocessing.{name}" for name in ("process", "util", "spawn", "resource_tracker", "forkserver"))
        ),
    ),
    Door(
        "Dask",
        (
            *("cluster/abroad.py", "cluster/accounting.py", "cluster/address.py", "cluster/client.py"),
            *("cluster/copies.py", "cluster/keeper.py", "cluster/local_host.py", "cluster/losses.py"),
            *("cluster/outer_task.py", "cluster/running.py", "tiers/dask.py"),
        ),
        imports_of("dask", "distributed"),
    ),
    # What a worker takes over from its parent is the environment itself, not what it says about us.
    Door("the environment", ("config.py", "workers/preparation.py"), environment_access),
    # What tasks print on workers goes through the last two.
    Door("printing", ("report.py", "progress.py", "__main__.py", "hearing.py", "retelling.py"), printing),
)


def _members_of(
    tree: ast.Module, module: str, members: frozenset[str], harmless: set[int] | None = None
) -> Iterator[tuple[int, str]]:
    bound = {imported.bound for imported in _imports(tree) if imported.path == module}
    for imported in _imports(tree):
        if imported.path in {f"{module}.{member}" for member in members}:
            yield imported.line, imported.path
    for node in ast.walk(tree):
        attribute = _attribute(node)
        if not attribute or id(node) in (harmless or ()):
            continue
        owner, member = attribute
        if isinstance(owner, ast.Name) and owner.id in bound and member in members:
            yield node.lineno, f"{module}.{member}"  # type: ignore[attr-defined]


def _attribute(node: ast.AST) -> tuple[ast.expr, str] | None:
    """Return (owner, attribute) of ``owner.attribute``, also when it is spelt with getattr and a literal."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"getattr", "setattr", "hasattr"}:
        literal = node.args[1] if len(node.args) > 1 else None
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
            return node.args[0], literal.value
    return None


def _owners(node: ast.expr) -> set[str]:
    """Return the first and the last name of a chain: {"self", "parallel"} for ``self.parallel``."""
    last = node.attr if isinstance(node, ast.Attribute) else ""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return {last, node.id} if isinstance(node, ast.Name) else {last}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _imports(tree: ast.Module) -> Iterator[Imported]:
    """Yield what the file imports from elsewhere, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Imported(node.lineno, alias.name, alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield Imported(node.lineno, f"{node.module}.{alias.name}", alias.asname or alias.name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield Imported(node.lineno, str(node.args[0].value), "")


if __name__ == "__main__":
    sys.exit(main())
