"""Which modules a server imports before it forks workers: those that tasks need, and never the user's own.

An import that every worker would repeat is done once. A module is preloaded if this process has imported it, tasks
need its package, and it is installed: the user's own modules may act when they are imported, and may be edited
between two calls, so workers import them themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import site
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

import joblib

__all__ = ["expensive", "is_installed", "modules_to_preload", "packages_of", "search_path"]

#: What every worker needs, whatever its tasks are.
_BASE: Final = frozenset({"joblib_backends", "numpy", "joblib", "cloudpickle", "threadpoolctl"})

#: Of our own package, only what workers use.
_OWN: Final = "joblib_backends"
_OWN_MODULES: Final = (f"{_OWN}.workers.main", f"{_OWN}.worker")

#: Loaded modules from which a package is worth a new server. Importing one takes 1-3 ms (M: scikit-learn 2 ms, pandas
#: 1.5 ms each), so 50 of them cost each worker about what it costs to start a server.
_EXPENSIVE_FROM: Final = 50

#: Objects of a batch to look at; a batch is alike within, and this costs 0.2 ms.
_MOST_OBJECTS: Final = 300


def modules_to_preload(packages: frozenset[str]) -> list[str]:
    """Return the installed modules of ``packages``, and of our own needs, that this process has imported, in order."""
    wanted = (packages | _BASE) - {_OWN, "__main__"}
    names = [
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in wanted and is_installed(name, module)
    ]
    return [*_OWN_MODULES, *names]


def expensive(packages: frozenset[str]) -> frozenset[str]:
    """Return those of ``packages`` whose import takes a worker so long that a new server pays."""
    counts = dict.fromkeys(packages, 0)
    for name in list(sys.modules):
        root = name.partition(".")[0]
        if root in counts:
            counts[root] += 1
    return frozenset(root for root, count in counts.items() if count >= _EXPENSIVE_FROM)


def is_installed(name: str, module: Any) -> bool:
    """Return whether a loaded module comes from the standard library or from site-packages."""
    root = name.partition(".")[0]
    if root == "__main__":
        return False
    if root == _OWN:
        return True
    try:
        spec = object.__getattribute__(module, "__dict__").get("__spec__")
        if spec is None or spec.name != name:
            return False  # an alias, or made at run time: the import would give something else
        if spec.origin in ("built-in", "frozen"):
            return True
        places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
        return bool(places) and all(os.path.normpath(place).startswith(_installed_prefixes()) for place in places)
    except Exception:  # a stand-in in sys.modules may be any object
        return False


def search_path() -> list[str]:
    """Return where a server looks for modules: not where the user's own are."""
    installed = [entry for entry in sys.path if entry and os.path.join(entry, "").startswith(_installed_prefixes())]
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    zipped = [entry for entry in sys.path if entry.endswith(f"python{sys.version_info[0]}{sys.version_info[1]}.zip")]
    # Our own package may be an editable install; last, because its folder holds more than the package. A zip that came
    # to a Dask worker holds nothing else, and another version may be installed there.
    return [*dict.fromkeys([*zipped, *installed, own] if os.path.isdir(own) else [own, *zipped, *installed])]


@functools.cache
def _installed_prefixes() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    with contextlib.suppress(AttributeError):  # a virtualenv of old replaces the module site
        folders |= {*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])}
    # Where site did not run (-S), Python does not know of its virtual environment; what we need is installed there.
    folders.add(os.path.dirname(os.path.dirname(joblib.__file__)))
    return tuple(os.path.join(os.path.normpath(folder), "") for folder in folders)


def packages_of(items: Iterable[Any]) -> frozenset[str]:
    """Return the top-level packages that tasks use, as far as can be seen without running them.

    Parameters
    ----------
    items : iterable
        joblib's tasks: (function, args, kwargs). Anything else is looked at as an argument. Never raises.
    """
    found: set[str] = set()
    waiting: deque[Any] = deque()
    with contextlib.suppress(Exception):
        waiting.extend(items)
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_OBJECTS:
        value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        with contextlib.suppress(Exception):
            waiting.extend(_parts_of(value, found))
    return frozenset(found - {"builtins", "__main__", ""})


def _parts_of(value: Any, found: set[str]) -> Iterator[Any]:
    """Note the packages of one object and yield what is in it."""
    if isinstance(value, str | bytes | int | float | complex | None):
        return
    if isinstance(value, types.ModuleType):
        found.add(value.__name__.partition(".")[0])
        if not is_installed(value.__name__, value):
            # The user's own, which a worker imports whole: what it has imported itself comes with it.
            yield from _imported_by(value, found)
    elif isinstance(value, dict):
        yield from list(value.values())[:_MOST_OBJECTS]
    elif isinstance(value, list | tuple | set | frozenset):
        yield from list(value)[:_MOST_OBJECTS]
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value, found)
    elif isinstance(value, type):
        found |= {_root(base) for base in value.__mro__}
    else:
        # An estimator of the user needs what its class is derived from.
        found |= {_root(base) for base in type(value).__mro__}
        found.add(_root(value))
        if isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, types.MethodType):
            yield from (value.__func__, value.__self__)
        else:
            # An estimator's parameters, a wrapper's function. No getattr: it may run the user's code.
            yield from list(object.__getattribute__(value, "__dict__").values())[:_MOST_OBJECTS]


def _parts_of_function(function: types.FunctionType, found: set[str]) -> Iterator[Any]:
    root = _root(function)
    found.add(root)
    module = sys.modules.get(function.__module__)
    if root not in _BASE and not is_installed(function.__module__, module):
        if root != "__main__" and isinstance(module, types.ModuleType):
            yield module
        # The user's own: what it names is what it will import or use.
        for name in function.__code__.co_names:
            used = function.__globals__.get(name)
            if isinstance(used, types.ModuleType | types.FunctionType | type):
                yield used
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):
                yield cell.cell_contents
    yield getattr(function, "__wrapped__", None)


def _imported_by(module: types.ModuleType, found: set[str]) -> Iterator[types.ModuleType]:
    """Note the packages of what a module of the user's has at its top, and yield its modules, the user's own too."""
    for value in list(vars(module).values()):
        if isinstance(value, types.ModuleType):
            yield value
        elif isinstance(value, type | types.FunctionType):
            root = _root(value)
            found.add(root)
            origin = sys.modules.get(value.__module__)
            if root not in _BASE and origin is not module and isinstance(origin, types.ModuleType):
                yield origin


def _root(value: Any) -> str:
    module = getattr(value, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""
