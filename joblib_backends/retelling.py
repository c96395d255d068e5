"""Says again in the parent what tasks said in workers, to the parent's own loggers, filters and streams.

Called by who delivers the results of the batch, right before that, and with no lock held: a handler is the user's code.
Nothing here fails a call, neither a handler that raises nor a filter that makes a warning an error: in the parent that
error would come from nowhere, and after the task. Such a warning is shown.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from .messages import OmittedMessages, Said, SaidPrint, SaidRecord, SaidWarning

__all__ = ["Retold", "retell"]

_log = logging.getLogger(__name__)

#: The name of the attribute of a record, or of a warning, that says which task it came from.
_TASK: Final = "joblib_task"


class Retold(NamedTuple):
    """A message that was said again, for the report."""

    kind: str
    text: str
    task: str


def retell(said: Iterable[Said], name_of: Callable[[int], str]) -> list[Retold]:
    """Say again what a batch said, in order.

    Parameters
    ----------
    said : iterable of messages
        What it said.
    name_of : callable
        Returns the name of a task by its place in the batch, and of all of them for -1.

    Returns
    -------
    list of Retold
        What the parent's levels let pass, and every warning, whatever the parent's filters do with it.
    """
    retold = []
    # A search's candidate takes some time to name, and may warn often.
    names = functools.cache(name_of)
    for message in said:
        task = names(message.place)
        try:
            one = _retell_one(message, task)
        except Exception as error:
            _log.debug("A message of %s could not be said again: %r", task, error)
            continue
        if one is not None:
            retold.append(one)
    return retold


def _retell_one(message: Said, task: str) -> Retold | None:
    match message:
        case SaidRecord():
            return _log_again(message.rebuilt(), task)
        case SaidWarning():
            return _warn_again(message, task)
        case SaidPrint():
            _write(message)
            return Retold("print", message.text, task)
        case OmittedMessages():
            text = f"{message.n_messages} more messages of the batch of {task} were left out."
            return _log_again(_log.makeRecord(_log.name, logging.WARNING, __file__, 0, text, (), None), task)


def _log_again(record: logging.LogRecord, task: str) -> Retold | None:
    task = _note_task(record, task)
    logger = logging.getLogger(record.name)
    if not logger.isEnabledFor(record.levelno):
        return None
    logger.handle(record)
    return Retold(record.levelname, record.getMessage(), task)


def _warn_again(message: SaidWarning, task: str) -> Retold:
    warning = message.rebuilt()
    task = _note_task(warning, task)
    category, filename, lineno = type(warning), message.filename, message.lineno
    try:
        registry = _registry_of(message.module or filename)
        warnings.warn_explicit(warning, category, filename, lineno, message.module, registry)
    except Warning as error:
        if error is not warning:
            raise
        # It has the frames of this call, which have it.
        warning.with_traceback(None)
        warnings.showwarning(warning, category, filename, lineno)
    return Retold(message.category, message.text, task)


def _note_task(message: Any, task: str) -> str:
    """Put the task into a message; one of a call in a task has a task already, that of the inner call."""
    inner = getattr(message, _TASK, None)
    task = f"{inner}, in {task}" if isinstance(inner, str) else task
    setattr(message, _TASK, task)
    return task


#: By module that this process has not imported, which of its warnings were shown.
_registries: Final[dict[str, dict[Any, Any]]] = {}


def _registry_of(module: str) -> dict[Any, Any]:
    """Return where Python notes which warnings of a module were shown: with n_jobs=1 it would be the same."""
    variables = getattr(sys.modules.get(module), "__dict__", None)
    if variables is None:
        return _registries.setdefault(module, {})
    registry: dict[Any, Any] = variables.setdefault("__warningregistry__", {})
    return registry


def _write(message: SaidPrint) -> None:
    stream = sys.stdout if message.stream == "stdout" else sys.stderr
    if stream is not None:
        stream.write(message.text)
