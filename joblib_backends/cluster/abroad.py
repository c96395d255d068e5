"""What runs on Dask's workers and scheduler before, or without, anything of ours there.

This file travels as its own source (``travel.py``) and is executed where it arrives, by a Python of another version
perhaps. So it needs the standard library and distributed only, and uses nothing newer than the oldest Python that
Dask runs on. What it returns is made of builtins.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed.diagnostics.plugin import WorkerPlugin

# ---- on a worker


class Arrival(WorkerPlugin):  # type: ignore[misc,unused-ignore]
    """Gives each worker the client's package before it gets work, and says what else is there.

    Parameters
    ----------
    package : str
        The name of our package.
    source : str
        The :func:`source_of` the client's.
    zipped : bytes
        A zip file of its source.
    topic : str
        Where workers say what they have.
    distributions : dict
        As for :func:`survey`.
    """

    #: A cluster that has it already is told nothing again.
    idempotent = True

    def __init__(self, package: str, source: str, zipped: bytes, topic: str, distributions: Mapping[str, str]) -> None:
        self.package = package
        self.source = source
        self.zipped = zipped
        self.topic = topic
        self.distributions = distributions

    def setup(self, worker: Any) -> None:
        """Put the package first on the path, unless it is here already, or another version is in use."""
        if self.package not in sys.modules and source_of(self.package) != self.source:
            self._unpack(worker.local_directory)
        report = survey(self.package, self.distributions)
        worker.log_event(self.topic, {"address": worker.contact_address, "report": report})

    def _unpack(self, folder: str) -> None:
        # Dask deletes its worker's folder when the worker ends, and that of a killed worker when the next one starts.
        # mkdtemp: nobody else may write to it, or guess its name.
        path = Path(tempfile.mkdtemp(prefix=f"{self.package}-", dir=folder)) / f"{self.source}.zip"
        path.write_bytes(self.zipped)
        sys.path.insert(0, str(path))
        importlib.invalidate_caches()


def survey(package: str, distributions: Mapping[str, str]) -> dict[str, Any]:
    """Return what is here, without importing it.

    Parameters
    ----------
    package : str
        The name of our package.
    distributions : dict
        The modules by whose absence a distribution is missing, by its name.

    Returns
    -------
    dict
        "source": what would be imported as our package, or has been; "imported": its version if it has been;
        "versions": of Python and of what is installed; "missing": distributions that cannot be imported.
    """
    missing = [name for name, module in distributions.items() if not is_there(module)]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    versions = {name: version_of(name) for name in distributions if name not in missing}
    return {
        "source": source_of(package),
        "imported": getattr(sys.modules[package], "__version__", "?") if package in sys.modules else None,
        "versions": {"Python": python, **{name: version for name, version in versions.items() if version}},
        "missing": missing,
    }


def is_there(module: str) -> bool:
    """Return whether a top-level module can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def version_of(distribution: str) -> str | None:
    """Return the installed version, or None if that is not known."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_of(package: str) -> str | None:
    """Return a hash of the source that is, or would be, imported as ``package``; None without one."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        return None
    folder = Path(spec.origin).parent
    # A zip of ours has it in its name.
    return folder.parent.stem if folder.parent.suffix == ".zip" else hash_of(sources_in(folder))


def sources_in(folder: Path) -> dict[str, bytes]:
    """Return the content of all Python files below a folder, by their relative paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def hash_of(sources: Mapping[str, bytes]) -> str:
    """Return what is equal for equal sources."""
    hasher = hashlib.sha256()
    for name, content in sorted(sources.items()):
        hasher.update(f"{name} {len(content)} ".encode())
        hasher.update(content)
    return hasher.hexdigest()[:32]


# ---- on the scheduler


def make_way(dask_scheduler: Any, prefix: str, name: str) -> dict[str, Any]:
    """Have workers that join get the plugin ``name``, and none that other versions of the client have registered.

    Returns
    -------
    dict
        "scheduler": what tells this one from every other; "is_there": whether it has the plugin.
    """
    for other in list(dask_scheduler.worker_plugins):
        if other.startswith(prefix) and other != name:
            del dask_scheduler.worker_plugins[other]
    return {"scheduler": str(dask_scheduler.id), "is_there": name in dask_scheduler.worker_plugins}


async def remove_worker(dask_scheduler: Any, address: str) -> None:
    """Take a worker out of the cluster now.

    Not ``retire_workers``, which waits for what the worker has in memory to be elsewhere, and it answers nobody.
    """
    await dask_scheduler.remove_worker(address, stimulus_id=f"task-timeout-{address}", expected=True, close=True)
