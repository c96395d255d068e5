"""What tasks say, log records, warnings and prints, in the form in which it travels to the parent.

A message is made in the worker when it is said, and rebuilt in the parent. It is made of builtins, and of pickles
within them: what cannot be pickled, or loaded, costs a message its class or an attribute, never a batch its outcome.
"""

from __future__ import annotations

import functools
import logging
import pickle
import reprlib
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final, Literal, NamedTuple

import cloudpickle

__all__ = ["OmittedMessages", "Said", "SaidPrint", "SaidRecord", "SaidWarning", "Stream"]

Stream = Literal["stdout", "stderr"]

#: What every Python loads without a class.
_PLAIN: Final = (str, int, float, bool, type(None))


class SaidRecord(NamedTuple):
    """A log record, with its message and the text of its exception made where it was said."""

    #: Which task of the batch ran, here and below; -1 before the first.
    place: int
    attributes: dict[str, Any]
    #: Pickles of attributes that are not plain, the user's own ``extra``.
    extras: dict[str, bytes]

    @classmethod
    def of(cls, record: logging.LogRecord, place: int) -> SaidRecord:
        """Return what travels of a record; its message may hold the user's objects, which do not."""
        attributes = {**vars(record), "msg": record.getMessage(), "args": None, "exc_info": None}
        if record.exc_info and not record.exc_text:
            attributes["exc_text"] = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        plain = {name: value for name, value in attributes.items() if type(value) in _PLAIN}
        extras = {name: _pickle_or_text(value) for name, value in attributes.items() if name not in plain}
        return cls(place, plain, extras)

    @property
    def nbytes(self) -> int:
        """About as much as it takes to send it."""
        attributes, extras = self.attributes, self.extras
        return sum(len(value) for value in (*attributes.values(), *extras.values()) if isinstance(value, str | bytes))

    def rebuilt(self) -> logging.LogRecord:
        """Return the record."""
        extras = {name: _load(pickled, "an object that cannot be loaded here") for name, pickled in self.extras.items()}
        return logging.makeLogRecord({**self.attributes, **extras})


class SaidWarning(NamedTuple):
    """A warning that passed the filters of its worker, and where it came from."""

    place: int
    #: The pickle of the warning, empty where there is none.
    pickled: bytes
    category: str
    text: str
    filename: str
    lineno: int
    #: The module that it came from, as the filters and registries of warnings know it.
    module: str | None

    @classmethod
    def of(cls, message: Warning | str, category: type[Warning], filename: str, lineno: int, place: int) -> SaidWarning:
        """Return what travels of a warning, said by who calls this."""
        try:
            warning = message if isinstance(message, Warning) else category(message)
            pickled, text = bytes(cloudpickle.dumps(warning, protocol=5)), str(warning)
        except Exception:
            pickled, text = b"", _text_of(message)
        module = _module_that_warns(sys._getframe(1), filename, lineno) or _module_of(filename)
        return cls(place, pickled, category.__qualname__, text, filename, lineno, module)

    @property
    def nbytes(self) -> int:
        """About as much as it takes to send it."""
        return len(self.pickled) + len(self.text) + len(self.filename)

    def rebuilt(self) -> Warning:
        """Return the warning, or a UserWarning with its text where its class cannot be had."""
        warning = _load(self.pickled, None) if self.pickled else None
        return warning if isinstance(warning, Warning) else UserWarning(f"{self.category}: {self.text}")


class SaidPrint(NamedTuple):
    """What was written to a standard stream, piece by piece: a task that prints much would be slow with one text."""

    place: int
    stream: Stream
    pieces: list[str]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


class OmittedMessages(NamedTuple):
    """Says how many messages of a batch were too many."""

    place: int
    n_messages: int


Said = SaidRecord | SaidWarning | SaidPrint | OmittedMessages


def _pickle_or_text(value: Any) -> bytes:
    try:
        return bytes(cloudpickle.dumps(value, protocol=5))
    except Exception:
        return pickle.dumps(_text_of(value))


def _load(pickled: bytes, instead: Any) -> Any:
    try:
        return pickle.loads(pickled)
    except Exception:
        return instead


def _text_of(value: object) -> str:
    try:
        return str(value) if isinstance(value, str | Warning) else reprlib.repr(value)
    except Exception:  # the user's own __str__
        return f"{type(value).__qualname__}, whose text cannot be made"


def _module_that_warns(frame: FrameType | None, filename: str, lineno: int) -> str | None:
    """Return the name of the module of the line that a warning names, if that is among the callers."""
    for caller in _frames(frame):
        if caller.f_lineno == lineno and caller.f_code.co_filename == filename:
            name = caller.f_globals.get("__name__")
            return name if isinstance(name, str) else None
    return None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@functools.lru_cache(maxsize=256)
def _module_of(filename: str) -> str | None:
    """Return the name of the module that a file is, for a warning that is only shown again."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == filename:
            return name
    return None
