"""Warnings of a computation that is done once: noted while it runs, shown again to each who takes what it gave.

Python has one function that shows warnings, for all threads. While anything is noted, ours stands in its place; it
notes what comes from its thread, and hands everything on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Final, NamedTuple

__all__ = ["Noted", "noting", "show_again"]


class Noted(NamedTuple):
    """A warning that passed the filters, and where it came from."""

    message: Warning
    category: type[Warning]
    filename: str
    lineno: int


class _Notes:
    """What is noted now, by thread. The lock guards who is first and who is last."""

    lock: ClassVar[threading.Lock] = threading.Lock()
    of_thread: ClassVar[dict[int, list[Noted]]] = {}
    shows: ClassVar[Any] = None


def _show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    notes = _Notes.of_thread.get(threading.get_ident())
    if notes is not None:
        notes.append(Noted(message, category, filename, lineno))
    (_Notes.shows or _standard_show)(message, category, filename, lineno, file, line)


#: What Python itself shows warnings with; it is also the one that ``catch_warnings(record=True)`` records through.
_standard_show: Final = warnings.showwarning


@contextlib.contextmanager
def noting() -> Iterator[list[Noted]]:
    """Note the warnings of this thread in this block; they are shown all the same.

    Race: another thread that leaves a ``warnings.catch_warnings`` of its own meanwhile puts back what it found, and
    later warnings are shown, but not noted. (Until Python 3.14 a block in one thread changes the filters of all.)
    """
    thread = threading.get_ident()
    notes: list[Noted] = []
    with _Notes.lock:
        outer = _Notes.of_thread.get(thread)
        _Notes.of_thread[thread] = notes
        if warnings.showwarning is not _show:
            _Notes.shows, warnings.showwarning = warnings.showwarning, _show
    try:
        yield notes
    finally:
        with _Notes.lock:
            if outer is None:
                del _Notes.of_thread[thread]
            else:
                outer.extend(notes)
                _Notes.of_thread[thread] = outer
            if not _Notes.of_thread and warnings.showwarning is _show:
                # Kept: a thread's own block may put ours back later, and it must go on to show as was shown before.
                warnings.showwarning = _Notes.shows


def _forget_in_child() -> None:
    # A thread of the parent may have held it.
    _Notes.lock = threading.Lock()
    _Notes.of_thread = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def show_again(noted: list[Noted]) -> None:
    """Show each warning again. The filters have let it pass, and knew more of where it came from."""
    for one in noted:
        warnings.showwarning(one.message, one.category, one.filename, one.lineno)
