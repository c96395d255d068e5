"""How our code gets to where none of it is: to the workers and the scheduler of a Dask cluster.

::

    by source     ``abroad.py``, as text: what distributed itself calls there. Bytecode, which cloudpickle sends, is
                  read by one version of Python only, and crashes others.
    as a zip      the whole package, which a plugin of ``abroad.py`` puts on the path of each worker, once
    by name       what a batch runs, found when it runs: the scheduler reads a task, too, and has none of it
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..version import DISTRIBUTION, version
from . import abroad

__all__ = [
    "PACKAGE",
    "PLUGIN_PREFIX",
    "FromSource",
    "Zipped",
    "by_name",
    "luggage",
    "made_from_source",
    "zipped_package",
]

PACKAGE: Final = __name__.partition(".")[0]

#: What the name of the plugin begins with that has the package; other plugins of ours are called otherwise.
PLUGIN_PREFIX: Final = f"{PACKAGE}-source-"

#: The same bytes for the same sources: zip files of today differ from those of tomorrow.
_SOME_DAY: Final = (1980, 1, 1, 0, 0, 0)


class Zipped(NamedTuple):
    """The source of the package."""

    #: A hash of it: what ``abroad.source_of`` returns where it has arrived.
    source: str
    content: bytes


@functools.cache
def zipped_package() -> Zipped:
    """Return this package as a zip file; made once per process.

    Its version is in it, too, but not in the hash: one commit may have been installed by several names.
    """
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    if folder.parent.suffix == ".zip":
        # This is a worker, to which it has travelled.
        return Zipped(folder.parent.stem, folder.parent.read_bytes())
    sources = abroad.sources_in(folder)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(sources.items()):
            _write(archive, f"{PACKAGE}/{name}", content)
        _write(archive, f"{PACKAGE}-{version()}.dist-info/METADATA", _metadata())
    return Zipped(abroad.hash_of(sources), stream.getvalue())


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _SOME_DAY)
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)


def _metadata() -> bytes:
    # Before what is installed on a worker, or our code there would take the version of that for its own.
    return f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version()}\n".encode()


class FromSource:
    """A function or class that is pickled as the source of its module, which imports nothing of ours.

    Parameters
    ----------
    definition : function or class
        What a module such as ``abroad.py`` defines at its top level.
    """

    def __init__(self, definition: Any) -> None:
        self._definition = definition

    def __repr__(self) -> str:
        return f"<FromSource {self._definition.__qualname__}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._definition(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (_expression_making(self._definition),)


@functools.cache
def _expression_making(definition: Any) -> str:
    """Return an expression whose value is what the source of a module defines."""
    source = inspect.getsource(sys.modules[definition.__module__])
    namespace = {"__name__": definition.__module__.replace(".", "_")}
    return f"(lambda namespace: (exec({source!r}, namespace), namespace[{definition.__name__!r}])[1])({namespace!r})"


def made_from_source(kind: type, *args: Any) -> Any:
    """Return ``kind(*args)``, a plugin for a process that has nothing of ours: it is pickled as source and ``args``."""

    class Made(kind):  # type: ignore[misc]
        def __reduce__(self) -> tuple[Any, ...]:
            return FromSource(kind), args

    return Made(*args)


def luggage(topic: str, distributions: dict[str, str]) -> Any:
    """Return the plugin that takes the package to the workers of a cluster, those that join later too.

    Its name has the hash of the source: a client with another one replaces it.
    """
    zipped = zipped_package()
    plugin = made_from_source(abroad.Arrival, PACKAGE, zipped.source, zipped.content, topic, distributions)
    plugin.name = f"{PLUGIN_PREFIX}{zipped.source}"
    return plugin


def by_name(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, dict[str, Any]]:
    """Return what ``eval`` is to be given on a worker for it to call a function of ours, found when it is called.

    A function that is pickled by its name is looked up by the scheduler, too; one that is pickled by value is
    unpickled and pickled again there for each task.
    """
    expression = f"__import__({function.__module__!r}, fromlist=['']).{function.__name__}(*args, **kwargs)"
    return expression, {"args": args, "kwargs": kwargs}
