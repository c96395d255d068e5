"""What was learned of each kind of task, for this process and, in a small file, for the next.

The file is ``profile-1.json`` in the user's cache folder. It may be deleted at any time; one that is damaged, of
another version or written by something else is ignored with one debug line, and replaced at the next save. It holds
names of functions and classes, and numbers; nothing of any data.

Thread-safe. The lock is held while memory is read or changed, never while the file is.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from .config import profile_path
from .experience import Experience

__all__ = ["Profile"]

_VERSION: Final = 1

#: Kinds that are kept, the latest used: some 250 bytes each.
_MAX_KINDS: Final = 500

#: Bytes beyond which a file is not ours.
_MAX_NBYTES: Final = 4_000_000

_log = logging.getLogger(__name__)


class Profile:
    """Experience by the name of the kind.

    Parameters
    ----------
    path : Path or None
        The file to start from and to save to; None keeps nothing beyond the process.
    """

    _shared: ClassVar[Profile | None] = None
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def shared(cls) -> Profile:
        """Return the profile of this process; it is saved when the process ends."""
        with cls._shared_lock:
            if cls._shared is None:
                cls._shared = cls(profile_path())
                atexit.register(cls._shared.save_if_own)
            return cls._shared

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._learned: OrderedDict[str, Experience] = OrderedDict()
        self._new: set[str] = set()
        self._from_file: Mapping[str, Experience] | None = None

    def __repr__(self) -> str:
        return f"<Profile {len(self._learned)} kinds learned, {self._path}>"

    def lookup(self, name: str) -> Experience | None:
        """Return what is known of a kind of task, or None."""
        saved = self._saved()
        with self._lock:
            return self._learned.get(name) or saved.get(name)

    def learn(self, name: str, newer: Experience) -> None:
        """Add what a call showed."""
        known = self.lookup(name)
        with self._lock:
            self._learned[name] = newer if known is None else known.merged(newer)
            self._learned.move_to_end(name)
            self._new.add(name)
            while len(self._learned) > _MAX_KINDS:
                self._learned.popitem(last=False)

    def save_if_own(self) -> None:
        """Save at the end of the process that made this object; a forked child leaves that to its parent."""
        if self._pid == os.getpid():
            self.save()

    def save(self) -> None:
        """Write what was learned over what the file holds now; a place that cannot be written is no error."""
        with self._lock:
            new = {name: self._learned[name] for name in self._learned if name in self._new}
        if self._path is None or not new:
            return
        # Other processes may have saved since: theirs is kept where this one learned nothing.
        kinds = {name: kind for name, kind in _read(self._path).items() if name not in new} | new
        kept = list(kinds.items())[-_MAX_KINDS:]
        document = {"version": _VERSION, "kinds": {name: kind.as_dict() for name, kind in kept}}
        try:
            _replace(self._path, json.dumps(document, indent=0))
        except OSError as error:
            _log.debug("The profile %s was not saved: %s", self._path, error)
        else:
            with self._lock:
                self._new.difference_update(new)

    def _saved(self) -> Mapping[str, Experience]:
        # Read once, by whoever asks first; two at once would read the same.
        if self._from_file is None:
            self._from_file = {} if self._path is None else _read(self._path)
        return self._from_file


def _read(path: Path) -> dict[str, Experience]:
    try:
        if path.stat().st_size > _MAX_NBYTES:
            raise ValueError(f"it has more than {_MAX_NBYTES} bytes")
        document: Any = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("version") != _VERSION:
            raise ValueError(f"it is not of version {_VERSION}")
        kinds = document.get("kinds")
        if not isinstance(kinds, dict):
            raise ValueError("it has no kinds of tasks")
        return _usable(path, kinds)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log.debug("The profile %s is ignored: %s", path, error)
        return {}


def _usable(path: Path, kinds: dict[str, Any]) -> dict[str, Experience]:
    """Return the kinds that can be read; one that cannot does not spoil the others."""
    found, problems = {}, []
    for name, data in kinds.items():
        try:
            found[name] = Experience.from_dict(data)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        _log.debug("%d kinds in the profile %s are ignored: %s", len(problems), path, problems[0])
    return found


def _replace(path: Path, text: str) -> None:
    """Write ``text`` in one step: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _start_anew_in_child() -> None:
    # A lock that another thread of the parent held would stay locked in a forked child.
    Profile._shared, Profile._shared_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)
