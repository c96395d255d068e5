"""How long residents live: a scope holds those of one context, and lets go of all when the context ends.

A resident that is the whole memory of a living object is held while that object lives. Any other one
(scikit-learn's float32 copy, a window of a larger array, an Arrow buffer) is held in an allowance, least
recently used first out, because the next task or the next search makes the same copy again and should find it
placed. The scope of the process, used where no context was opened, empties its allowance with each call.

Thread-safe. Finalizers of owners run in any thread, maybe in the middle of ``hold``, so they do nothing but one
append to a deque; the next ``hold`` does the work.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from typing import Any, Final

from ..memory import memory_nbytes
from .store import Resident, Store

__all__ = ["ResidentScope"]

#: Share of the machine's memory that residents without a living owner may keep, least recently used first out.
_IDLE_FRACTION: Final = 0.1


class ResidentScope:
    """The residents that one context keeps.

    Parameters
    ----------
    store : Store
        Where the residents are.
    outlives_calls : bool
        Whether residents without a living owner stay from one call to the next.
    idle_nbytes : int or None, default=None
        Bytes that such residents may keep; None is a tenth of the machine's memory.
    """

    def __init__(self, store: Store, *, outlives_calls: bool, idle_nbytes: int | None = None) -> None:
        self.store = store
        self.outlives_calls = outlives_calls
        self._allowance = memory_nbytes() * _IDLE_FRACTION if idle_nbytes is None else idle_nbytes
        self._lock = threading.Lock()
        self._pinned: dict[bytes, Resident] = {}
        self._owned: dict[int, Resident] = {}
        self._orphaned: deque[int] = deque()
        self._idle: OrderedDict[bytes, Resident] = OrderedDict()

    def __repr__(self) -> str:
        return f"<ResidentScope {len(self._pinned)} pinned, {len(self._owned)} owned, {len(self._idle)} idle>"

    def pin(self, resident: Resident) -> None:
        """Hold a resident until the scope ends, whatever becomes of its owner (``scatter``)."""
        with self._lock:
            self._pinned[resident.digest] = resident

    def hold(self, resident: Resident, address: int, owner: Any = None) -> None:
        """Hold a resident; ``owner``, if given, is the object whose whole memory, at ``address``, it copies.

        Memory with new content lets go of what it held before, so a loop that changes one array in place keeps
        one resident, not one per turn.
        """
        with self._lock:
            self._settle_orphans()
            known = self._owned.get(address)
            if known is resident:
                return
            if not _can_be_watched(owner):
                self._keep_idle(resident)
                return
            self._owned[address] = resident
        self.store.remember_region(address, resident)
        if known is None:
            weakref.finalize(owner, _owner_died, weakref.ref(self), address).atexit = False

    def end_call(self) -> None:
        """Let go of what only the allowance holds, unless this scope outlives calls."""
        with self._lock:
            self._settle_orphans()
            if not self.outlives_calls:
                self._idle = OrderedDict()

    def release(self) -> None:
        """Let go of everything. Batches in flight still hold what they need."""
        with self._lock:
            self._pinned, self._owned, self._idle = {}, {}, OrderedDict()

    def _settle_orphans(self) -> None:
        while self._orphaned:
            resident = self._owned.pop(self._orphaned.popleft(), None)
            if resident is not None:
                self._keep_idle(resident)

    def _keep_idle(self, resident: Resident) -> None:
        self._idle[resident.digest] = resident
        self._idle.move_to_end(resident.digest)
        while len(self._idle) > 1 and sum(r.nbytes for r in self._idle.values()) > self._allowance:
            self._idle.popitem(last=False)

    def _forget_owner(self, address: int) -> None:
        self.store.forget_region(address)
        if self.outlives_calls:
            self._orphaned.append(address)
        else:
            self._owned.pop(address, None)


def _owner_died(scope_ref: weakref.ref[ResidentScope], address: int) -> None:
    scope = scope_ref()
    if scope is not None:
        scope._forget_owner(address)


def _can_be_watched(owner: Any) -> bool:
    if owner is None:
        return False
    try:
        weakref.ref(owner)
    except TypeError:
        return False
    return True
