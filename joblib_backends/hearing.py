"""Hears in a worker what its tasks say, so that it can travel to the parent with the outcome of their batch.

::

    worker: task ── log record ──> handler of the root logger ──┐
                 ── warning ─────> warnings.showwarning ────────┼──> Heard, of the batch ──> outcome ──> retelling.py
                 ── print ───────> sys.stdout, sys.stderr ──────┘    (prints in notebooks only)

With the outcome, and not as it is said: so each message comes once and with its task, and none comes of a batch that is
lost, which is run again.

Who hears what: several threads of a Dask worker run batches of several calls, and tasks of others, so a batch hears the
threads that run it: its own, and those of the crew that it sets to work. A process worker runs one batch at a time, and
that hears every thread. What nobody hears goes where it would go without us.

In a Dask worker the handler is there only while batches run. It stands back wherever anybody has configured logging.
It is one of the root logger, not ``logging.lastResort``, which never sees a record of a library with a ``NullHandler``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from .messages import OmittedMessages, Said, SaidPrint, SaidRecord, SaidWarning, Stream

__all__ = ["Heard", "Listening", "belonging_to", "current", "hearing", "is_hearing_process"]

#: Messages of one batch, and bytes of their texts, that travel; the rest is counted.
_MOST_MESSAGES: Final = 1_000
_MOST_NBYTES: Final = 1_000_000

T = TypeVar("T")


class Listening(NamedTuple):
    """What the parent wants to hear; by default what a fresh process would say."""

    #: Levels of loggers that were given one, by name, and what ``logging.disable`` was given.
    levels: tuple[tuple[str, int], ...] = ()
    disabled: int = logging.NOTSET
    #: Whether prints are messages: in a notebook, what a worker prints reaches nobody.
    hears_prints: bool = False

    @classmethod
    def now(cls) -> Listening:
        """Return what this process wants to hear of a call that it begins; a few µs for each hundred loggers."""
        root = logging.getLogger()
        # A copy: other threads import modules, which make loggers.
        loggers = list(root.manager.loggerDict.items())
        levels = [(name, one.level) for name, one in loggers if isinstance(one, logging.Logger) and one.level]
        if root.level != logging.WARNING:
            levels.append((root.name, root.level))
        outer = current()
        # The parent of a call in a task is a worker; its notebook is further up.
        hears_prints = "ipykernel" in sys.modules or (outer is not None and outer.hears_prints)
        return cls(tuple(levels), root.manager.disable, hears_prints)


class Heard:
    """What one batch has said so far. Thread-safe; the lock may be taken again by a ``__del__`` that prints."""

    def __init__(self, listening: Listening) -> None:
        self.hears_prints = listening.hears_prints
        #: Which task of the batch runs; -1 before the first.
        self.place = -1
        self._messages: list[Said] = []
        self._nbytes = 0
        self._n_omitted = 0
        self._is_over = False
        self._pid = os.getpid()
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Heard {len(self._messages)} messages, {self._nbytes} bytes>"

    @property
    def is_on(self) -> bool:
        """Whether the batch runs, in this process: what a child says that a task forked would be lost with it."""
        return not self._is_over and self._pid == os.getpid()

    def each(self, tasks: Iterable[T]) -> Iterator[T]:
        """Yield the tasks of the batch, and note which of them runs."""
        for task in tasks:
            self.place += 1
            yield task

    def add(self, make: Callable[[int], SaidRecord | SaidWarning]) -> None:
        """Take a message, made for the task that runs, if there is room."""
        message = make(self.place) if len(self._messages) < _MOST_MESSAGES else None
        with self._lock:
            if message is None or self._nbytes + message.nbytes > _MOST_NBYTES:
                self._n_omitted += 1
            else:
                self._messages.append(message)
                self._nbytes += message.nbytes

    def add_print(self, stream: Stream, text: str) -> None:
        """Take what was written to a stream."""
        with self._lock:
            last = self._messages[-1] if self._messages else None
            goes_on = isinstance(last, SaidPrint) and (last.place, last.stream) == (self.place, stream)
            if self._nbytes + len(text) > _MOST_NBYTES or not (goes_on or len(self._messages) < _MOST_MESSAGES):
                # A print writes its end apart.
                self._n_omitted += bool(text.strip())
                return
            self._nbytes += len(text)
            if isinstance(last, SaidPrint) and goes_on:
                last.pieces.append(text)
            else:
                self._messages.append(SaidPrint(self.place, stream, [text]))

    def end(self) -> tuple[Said, ...]:
        """Hear no more, and return what was said; a thread that a task left running must not keep it."""
        with self._lock:
            self._is_over = True
            said, self._messages = self._messages, []
            return (*said, OmittedMessages(self.place, self._n_omitted)) if self._n_omitted else tuple(said)


_heard: ContextVar[Heard | None] = ContextVar("heard", default=None)


class _Process:
    """What this process has in place to hear. The lock guards how many batches run."""

    lock: ClassVar[threading.Lock] = threading.Lock()
    n_batches: ClassVar[int] = 0
    is_hearing: ClassVar[bool] = False
    #: The batch that hears all threads.
    sole: ClassVar[Heard | None] = None
    #: What showed warnings before us.
    shows: ClassVar[Any] = None


def current() -> Heard | None:
    """Return what hears the calling thread now."""
    for heard in (_heard.get(), _Process.sole):
        if heard is not None and heard.is_on:
            return heard
    return None


def is_hearing_process() -> bool:
    """Return whether batches were heard in this process, which then is a worker."""
    return _Process.is_hearing


@contextlib.contextmanager
def hearing(listening: Listening, *, is_worker: bool, is_alone: bool) -> Iterator[Heard]:
    """Hear what the batch in this block says.

    Parameters
    ----------
    listening : Listening
        What the parent wants to hear.
    is_worker : bool
        Whether this process is a worker. In the parent itself everything is heard as it is said.
    is_alone : bool
        Whether this process is ours, and runs nothing beside the batch: then it takes over the parent's levels, too.
        Those of a Dask worker are of all who use it.
    """
    heard = Heard(listening)
    if not is_worker:
        yield heard
        return
    _begin(listening)
    if is_alone:
        _Levels.keep(listening)
        _Process.sole = heard
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)
        _Process.sole = None if is_alone else _Process.sole
        _end(stays=is_alone)


@contextlib.contextmanager
def belonging_to(heard: Heard | None) -> Iterator[None]:
    """Have a batch hear the calling thread in this block."""
    token = _heard.set(heard)
    try:
        yield
    finally:
        _heard.reset(token)


# ---- what is put in place


def _begin(listening: Listening) -> None:
    with _Process.lock:
        _Process.n_batches += 1
        _Process.is_hearing = True
        # Each time: a task may have configured logging anew, and taken it out.
        if _handler not in logging.getLogger().handlers:
            logging.getLogger().addHandler(_handler)
        if logging.basicConfig is _standard_basic_config:
            logging.basicConfig = _basic_config
        _take_warnings()
        if listening.hears_prints:
            _route("stdout")
            _route("stderr")


def _end(*, stays: bool) -> None:
    with _Process.lock:
        _Process.n_batches -= 1
        # In a process of ours it may stay: to put it there takes longer than all else here.
        if not _Process.n_batches and not stays:
            logging.getLogger().removeHandler(_handler)


def _take_warnings() -> None:
    """Put ours in the place of what shows warnings, unless a task did so meanwhile: then that has them.

    Race: a thread that leaves a ``catch_warnings`` puts back what it found, perhaps from before our time.
    """
    shows = warnings.showwarning
    # That of ``sharing/warned.py`` is there for a moment, and would take ours for what was there before.
    is_passing = getattr(shows, "__module__", "").startswith(f"{__package__}.")
    if not is_passing and _Process.shows in (None, shows):
        _Process.shows, warnings.showwarning = shows, _show


class _Handler(logging.Handler):
    """Hears the records that no other handler gets."""

    def emit(self, record: logging.LogRecord) -> None:
        if any(not isinstance(handler, _Handler | logging.NullHandler) for handler in _handlers_of(record.name)):
            return
        heard = current()
        try:
            if heard is not None:
                heard.add(functools.partial(SaidRecord.of, record))
            elif logging.lastResort is not None and record.levelno >= logging.lastResort.level:
                # Of another's task beside ours: as if this handler were not there.
                logging.lastResort.handle(record)
        except Exception:
            self.handleError(record)


def _handlers_of(name: str) -> Iterator[logging.Handler]:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


_handler: Final = _Handler()
_standard_basic_config: Final = logging.basicConfig


@functools.wraps(_standard_basic_config)
def _basic_config(**options: Any) -> None:
    # It does nothing where the root logger has a handler: an initializer, or a task, that configures logging would not.
    root = logging.getLogger()
    has_ours = _handler in root.handlers
    root.removeHandler(_handler)
    try:
        _standard_basic_config(**options)
    finally:
        if has_ours:
            root.addHandler(_handler)


def _show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    heard = current()
    if heard is None or file is not None:
        _Process.shows(message, category, filename, lineno, file, line)
    else:
        heard.add(lambda place: SaidWarning.of(message, category, filename, lineno, place))


class _Routed:
    """Stands for a standard stream: what a batch writes is heard, all else is left to the stream."""

    def __init__(self, name: Stream, stream: Any) -> None:
        self._name = name
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or have it heard."""
        heard = current()
        if heard is None or not heard.hears_prints or not isinstance(text, str):
            return int(self._stream.write(text))
        heard.add_print(self._name, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __reduce__(self) -> Any:
        # cloudpickle takes the standard streams by name, and knows them by being files.
        return getattr, (sys, self._name)


def _route(name: Stream) -> None:
    stream = getattr(sys, name)
    if stream is not None and not isinstance(stream, _Routed):
        setattr(sys, name, _Routed(name, stream))


class _Levels:
    """The parent's levels, kept until another parent, or the same at another time, has others."""

    listening: ClassVar[Listening] = Listening()
    #: Loggers that were given a level here: which, and the one that they had.
    changed: ClassVar[list[tuple[logging.Logger, int, int]]] = []

    @classmethod
    def keep(cls, listening: Listening) -> None:
        if listening[:2] == cls.listening[:2]:
            return
        for logger, given, before in cls.changed:
            # What the user's code has set since stays.
            if logger.level == given:
                logger.setLevel(before)
        if listening.disabled != cls.listening.disabled:
            logging.disable(listening.disabled)
        loggers = [(logging.getLogger(name), level) for name, level in listening.levels]
        cls.changed = [(logger, level, logger.level) for logger, level in loggers if logger.level != level]
        for logger, given, _ in cls.changed:
            logger.setLevel(given)
        cls.listening = listening


def _forget_in_child() -> None:
    # Another thread of a Dask worker may have held it.
    _Process.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
