"""Where modules come from, and what bytecode names. Nothing is imported for that, no code of the user runs."""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final

__all__ = [
    "DISTRIBUTIONS",
    "Import",
    "imports_of_module",
    "loaded_parts",
    "modules_of",
    "named_in",
    "package_of",
    "path_of",
    "version_of",
]

#: Directories that say that what lies in them was installed.
_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})
_PYTHON: Final = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep

#: Packages whose distribution has another name, where asking for it saves 0.3 s.
DISTRIBUTIONS: Final = {"sklearn": "scikit-learn"}

#: Ours is known by its version, however it was installed.
_OURS: Final = __name__.partition(".")[0]

#: In the names of those instructions that name something else than a global.
_NOT_GLOBAL: Final = ("ATTR", "METHOD", "IMPORT")


# ---- what bytecode says


@dataclass(frozen=True)
class Import:
    """One import statement: ``from`` so many dots and a name, import names."""

    level: int
    name: str
    names: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def named_in(code: CodeType) -> tuple[tuple[str, ...], tuple[Import, ...]]:
    """Return the globals that code names, and what it imports, that of nested functions included."""
    names: set[str] = set()
    imports: set[Import] = set()
    for nested in _all_code(code):
        before: list[Any] = [None, None]
        for instruction in dis.get_instructions(nested):
            if instruction.opname == "EXTENDED_ARG":
                continue
            if instruction.opname == "IMPORT_NAME":
                level, given = before
                level = level if isinstance(level, int) else 0
                imports.add(Import(level, instruction.argval, given if isinstance(given, tuple) else ()))
            elif instruction.opcode in dis.hasname and not any(kind in instruction.opname for kind in _NOT_GLOBAL):
                # Also by what new versions of Python may have: one name too many only costs a second run.
                names.add(instruction.argval)
            before = [before[1], instruction.argval]
    return tuple(sorted(names)), tuple(sorted(imports, key=repr))


def _all_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_code(constant)


# ---- where modules come from


@functools.lru_cache(maxsize=4096)
def version_of(name: str) -> str | None:
    """Return the version of the package of an installed module, "" for Python's own, None for one of the user."""
    root = name.partition(".")[0]
    if root == _OURS:
        return _version_of_package(root) or ""
    path = path_of(name)
    if path is None:
        if root in sys.stdlib_module_names or root in sys.builtin_module_names:
            return ""
        return version_of(root) if root != name else None
    path = os.path.realpath(path)
    if not _INSTALLED.isdisjoint(Path(path).parts):
        return _version_of_package(root)
    return "" if path.startswith(_PYTHON) else None


def _version_of_package(root: str) -> str | None:
    """Return a version, or None for what lies among the installed without one: that is known by its files."""
    version = getattr(sys.modules.get(root), "__dict__", {}).get("__version__")
    if isinstance(version, str):
        return version
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(DISTRIBUTIONS.get(root, root))
    names = sorted(set(_distributions().get(root, ())))
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or None


@functools.lru_cache(maxsize=1)
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def _spec_of(name: str) -> ModuleSpec | None:
    """Return where a module comes from or would come from; nothing is imported."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    parent = name.rpartition(".")[0]
    try:
        if not parent:
            return importlib.util.find_spec(name)
        package = _spec_of(parent)
        folders = None if package is None else package.submodule_search_locations
        return PathFinder.find_spec(name, folders) if folders is not None else None
    except (ImportError, ValueError):
        return None


def path_of(name: str) -> str | None:
    path = getattr(sys.modules.get(name), "__file__", None)
    if isinstance(path, str):
        return path
    spec = _spec_of(name)
    return spec.origin if spec is not None and spec.has_location else None


def package_of(name: str) -> str | None:
    spec = _spec_of(name)
    return None if spec is None else spec.parent


def imports_of_module(name: str) -> tuple[Import, ...]:
    spec = _spec_of(name)
    try:
        code = spec.loader.get_code(spec.name)  # type: ignore[union-attr]
    except Exception:
        # Compiled, not on disk, or with an error that its import will tell.
        return ()
    return named_in(code)[1] if code is not None else ()


def loaded_parts(name: str) -> Iterator[ModuleType]:
    values = list(getattr(sys.modules.get(name), "__dict__", {}).values())
    return (value for value in values if isinstance(value, ModuleType))


def modules_of(one: Import, package: str | None) -> Iterator[str]:
    """Return the names of the modules that an import statement may load."""
    base = one.name
    if one.level:
        above = (package or "").split(".")[: -(one.level - 1) or None]
        base = ".".join([*above, base] if base else above)
    parts = base.split(".")
    names = [".".join(parts[: n + 1]) for n in range(len(parts))]
    names += [f"{base}.{part}" for part in one.names]
    return (name for name in names if name and _spec_of(name) is not None)
