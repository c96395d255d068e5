"""What the calls of one context share: what was placed, and what was started."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import ClassVar, Final

from .data.scope import ResidentScope
from .data.store import default_store

__all__ = ["Context"]

#: What a forked child must neither use nor let go of, because its end takes locks that the parent may have held.
_inherited: Final[list[object]] = []


@dataclass
class Context:
    """What the calls of one context share; when the last of its backends is collected, so is all of this."""

    scope: ResidentScope
    warm: dict[str, object] = field(default_factory=dict)
    pid: int = field(default_factory=os.getpid)

    _of_process: ClassVar[Context | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def of_calls(cls) -> Context:
        """Return the context of a ``with`` block, or of whoever else holds a backend."""
        return cls(ResidentScope(default_store(), outlives_calls=True))

    @classmethod
    def of_process(cls) -> Context:
        """Return the context of those backends that live too briefly to keep anything."""
        with cls._lock:
            if cls._of_process is None:
                cls._of_process = cls(ResidentScope(default_store(), outlives_calls=False))
            return cls._of_process

    def leave_to_parent(self) -> None:
        """Start anew in a forked child: files, locks and workers are the parent's."""
        if self.pid == os.getpid():
            return
        with self._lock:
            if self.pid == os.getpid():
                return
            _inherited.append((self.scope, self.warm))
            self.scope = ResidentScope(default_store(), outlives_calls=self.scope.outlives_calls)
            self.warm, self.pid = {}, os.getpid()


def _forget_in_child() -> None:
    # A thread of the parent may have held it.
    Context._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
