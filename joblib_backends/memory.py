"""How much memory there is, and whether it runs short: of the machine, or of the control groups around this process.

A kernel that runs out of memory kills the largest process, which is a worker with a task, or the driver. It is cheaper
not to start another task before.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

__all__ = ["LOOK_AGAIN_S", "MemoryWatch", "available_nbytes", "memory_nbytes"]

#: Where Linux mounts control groups of the second and of the first version.
_GROUPS: Final = Path("/sys/fs/cgroup")

#: Memory is short below this part of it, or below this many bytes where the part is more.
_SHORT_FRACTION: Final = 0.1
_SHORT_NBYTES: Final = 1 << 30

#: Seconds for which an answer holds: a look takes up to 0.1 ms, and to fill 1 GB takes a process longer than this.
_VALID_S: Final = 0.1


#: Seconds after which somebody who was refused should ask again.
LOOK_AGAIN_S: Final = 0.5

#: Seconds after which one more may start although memory is short: what takes it may be somebody else's, or what runs
#: may wait for what would start.
_PATIENCE_S: Final = 5.0


class _Group(NamedTuple):
    """The files of one control group that limits memory."""

    limit: Path
    used: Path
    stat: Path
    #: The line of ``stat`` with the pages of files that the kernel can drop, which count as used.
    droppable: str


def memory_nbytes() -> int:
    """Return the bytes of memory that this machine, or the container around this process, has."""
    return min([_physical_nbytes(), *(_number_in(group.limit) for group in _limiting_groups())])


def available_nbytes() -> int | None:
    """Return the bytes that can still be taken before something is killed; None where the system does not tell."""
    free = [nbytes for group in _limiting_groups() if (nbytes := _left_in(group)) is not None]
    machine = _line_of(Path("/proc/meminfo"), "MemAvailable:")
    return min([*free, *([] if machine is None else [machine * 1024])], default=None)


class MemoryWatch:
    """Says whether memory is short; looks at most every 0.1 s. Thread-safe: what two threads race for is equal."""

    _shared: ClassVar[MemoryWatch | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def shared(cls) -> MemoryWatch:
        """Return the watch of this process."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            return cls._shared

    def __init__(self) -> None:
        self._reserve = min(memory_nbytes() * _SHORT_FRACTION, _SHORT_NBYTES)
        self._answer, self._asked = False, -_VALID_S
        self._refused_since: float | None = None
        self._n_kills = _n_kills()

    def __repr__(self) -> str:
        return f"<MemoryWatch {'short' if self._answer else 'enough'}>"

    @property
    def is_short(self) -> bool:
        """Whether no further task should start beside those that run."""
        now = time.monotonic()
        if now - self._asked >= _VALID_S:
            available = available_nbytes()
            self._answer, self._asked = available is not None and available < self._reserve, now
        return self._answer

    def allows_another(self) -> bool:
        """Return whether a batch may start beside those that run. Who is refused asks again, after ``LOOK_AGAIN_S``."""
        if not self.is_short:
            self._refused_since = None
            return True
        now = time.monotonic()
        since = self._refused_since
        if since is None or now - since > _PATIENCE_S:
            self._refused_since = now
        return since is not None and now - since > _PATIENCE_S

    def has_killed(self) -> bool:
        """Return whether the kernel has killed a process for want of memory that no earlier call was told of.

        It counts those of the whole machine, so this is asked only about a process that was killed.
        """
        n_kills = _n_kills()
        with self._lock:
            is_news = n_kills > self._n_kills
            self._n_kills += is_news
        return is_news

    def forget_kills(self) -> None:
        """Count from now on: earlier kills are not those of processes that start now."""
        self._n_kills = _n_kills()


@functools.lru_cache(maxsize=1)
def _limiting_groups() -> tuple[_Group, ...]:
    """Return the groups that limit memory; a group without a limit, or with more than the machine has, does not."""
    physical = _physical_nbytes()
    return tuple(group for group in _groups() if 0 < _number_in(group.limit) < physical)


def _physical_nbytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def _groups() -> Iterator[_Group]:
    """Yield the control groups around this process, its own first; in a container the outermost is its own."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        own = root / path.lstrip("/")
        # A container may see the path of the host here, and its files at the root of the mount.
        for folder in (own, *(parent for parent in own.parents if parent == root or root in parent.parents)):
            if controllers:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                yield _Group(folder / names[0], folder / names[1], folder / "memory.stat", "total_inactive_file")
            else:
                yield _Group(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file")


def _left_in(group: _Group) -> int | None:
    limit, used = _number_in(group.limit), _number_in(group.used)
    if not limit or not used:
        return None
    return limit - used + (_line_of(group.stat, group.droppable) or 0)


def _n_kills() -> int:
    return _line_of(Path("/proc/vmstat"), "oom_kill") or 0


def _number_in(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return 0


def _line_of(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)


def _forget_in_child() -> None:
    MemoryWatch._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
