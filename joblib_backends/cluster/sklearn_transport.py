"""What we know of the transport of scikit-learn's callbacks, which is private. No other file of ours does.

A callback that is pickled carries a handle: the address of a socket in the process that called ``fit``, and the key
without which that socket listens to nobody. Where the callback is unpickled, its messages go to that socket.

The key does not travel with our batches: who has it can have that process unpickle what he likes, and a cluster may
not be encrypted. It is left in a file next to the socket, in the same folder that only its user may enter: who can
reach the socket can read the key, and who cannot reach it has no use for it. A named pipe of Windows is in no folder;
there the key travels as scikit-learn sends it.

A transport of another shape, of another version of scikit-learn, is left alone: its handles travel as they are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from multiprocessing import AuthenticationError
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

from ..data.pickler import reduce_by

__all__ = [
    "Detour",
    "adopting",
    "arrived",
    "can_be_reached",
    "close_listener",
    "deliver",
    "forget_connection",
    "handles_have_left",
    "keep_keys_here",
    "open_listener",
    "take",
]


class Detour(NamedTuple):
    """How what is said to a listener that cannot be reached gets there all the same."""

    #: Returns a connection to an address in the place of one that cannot be made, or None.
    connect: Callable[[str], Any]
    #: Returns the handle that goes to other processes in the place of one that has arrived here.
    substitute: Callable[[Any], Any]


_MODULE: Final = "sklearn.callback._transport"

#: What the module must have for us to know it.
_NAMES: Final = frozenset(
    {"Client", "_listeners", "_message_consumers", "_worker_connections", "close_listener", "open_listener"}
)
_FIELDS: Final = ("address", "authkey")

#: The functions that connect; what they call by this name can be replaced.
_CONNECTING: Final = ("send", "can_reuse_listener")
_CONNECT: Final = "Client"

_KEY_SUFFIX: Final = ".key"

#: What a connection to a listener of another host ends with: no such socket; one that belongs to somebody else; an
#: address of another system.
_NOT_REACHED: Final = (OSError, EOFError, AuthenticationError, ValueError)

#: The listeners whose handles have left this process.
_left: Final[set[str]] = set()

#: The way around listeners that cannot be reached from this process, if there is one.
_detours: Final[list[Detour]] = []

_adopt: ContextVar[Callable[[str], object] | None] = ContextVar("adopt", default=None)


# ---- where the handle comes from


def keep_keys_here() -> None:
    """Have handles travel without their keys from now on, if scikit-learn's transport is loaded and known."""
    module = _transport()
    if module is not None:
        reduce_by(module.ListenerHandle, _reduce)


def handles_have_left() -> bool:
    """Return whether a batch with a handle in it was ever made in this process."""
    return bool(_left)


def deliver(address: str, message: Any) -> None:
    """Hand a message to a listener, in this process or another one of this host, and wait until it was taken.

    Nothing happens if it is not there any more.
    """
    module = _transport()
    if module is None:
        return
    consume = module._message_consumers.get(address)
    if consume is not None:
        consume(message)
        return
    with contextlib.suppress(*_NOT_REACHED):
        module.send(module.ListenerHandle(address, _key_of(address)), message)


def _reduce(handle: Any) -> tuple[Any, ...]:
    for detour in _detours:
        handle = detour.substitute(handle)
    is_kept = _leave_key(handle)
    _left.add(handle.address)
    return arrived, (handle.address, None if is_kept else handle.authkey)


def _leave_key(handle: Any) -> bool:
    """Leave a key next to its socket; return whether it may stay behind."""
    if not os.path.isabs(handle.address) or handle.address.startswith("\\\\"):
        return False
    if os.path.exists(handle.address + _KEY_SUFFIX) or not os.path.exists(handle.address):
        # It is there already, or nobody listens any more.
        return True
    folder = Path(handle.address).parent
    _sweep(folder)
    try:
        # Under another name first: a second thread may be here, and a worker may read already.
        fd, path = tempfile.mkstemp(suffix=_KEY_SUFFIX, dir=folder)
        with open(fd, "wb") as file:
            file.write(handle.authkey)
        os.replace(path, handle.address + _KEY_SUFFIX)
    except OSError:
        return False
    return True


def _sweep(folder: Path) -> None:
    """Delete the keys of listeners that are closed."""
    for path in folder.glob(f"listener-*{_KEY_SUFFIX}"):
        address = str(path)[: -len(_KEY_SUFFIX)]
        if not os.path.exists(address):
            _left.discard(address)
            with contextlib.suppress(OSError):
                path.unlink()


def _key_of(address: str) -> bytes:
    try:
        return Path(address + _KEY_SUFFIX).read_bytes()
    except (OSError, ValueError):
        return b""


# ---- where it arrives


def arrived(address: str, authkey: bytes | None = None) -> Any:
    """Return the handle of a listener; called where a batch is unpickled.

    It must be done before the callback is whole: ScoringMonitor looks at once whether it can be heard, and if not,
    speaks to itself from then on.
    """
    module = importlib.import_module(_MODULE)
    if not _is_known(module):
        return module.ListenerHandle(address, authkey or _key_of(address))
    if not isinstance(module.Client, _Connecting):
        module.Client = _Connecting(module.Client)  # type: ignore[attr-defined]
    adopt = _adopt.get()
    if adopt is not None:
        adopt(address)
    return _arrived_class(module.ListenerHandle)(address, authkey or _key_of(address))


@functools.cache
def _arrived_class(handle_class: Any) -> Any:
    """Return the class of handles that have arrived; they travel on without their keys, whoever pickles them."""
    return type("ArrivedHandle", (handle_class,), {"__slots__": (), "__reduce__": _reduce})


@contextlib.contextmanager
def adopting(adopt: Callable[[str], object]) -> Iterator[None]:
    """Have ``adopt(address)`` called for each handle that is unpickled in this thread and this block."""
    token = _adopt.set(adopt)
    try:
        yield
    finally:
        _adopt.reset(token)


def take(detour: Detour) -> None:
    """Take a detour where listeners cannot be reached, from now on."""
    if detour not in _detours:
        _detours.append(detour)


def forget_connection(address: str, kind: type) -> None:
    """Drop the connection to a listener, if it is of this kind: who speaks to it next connects again."""
    module = _transport()
    if module is not None and isinstance(module._worker_connections.get(address), kind):
        module._worker_connections.pop(address, None)


def can_be_reached(handle: Any) -> bool:
    """Return whether a listener is in this process, or can be connected to from here."""
    module = _transport()
    if module is None or handle.address in module._listeners:
        return True
    connect = module.Client.client if isinstance(module.Client, _Connecting) else module.Client
    try:
        connect(handle.address, authkey=handle.authkey).close()
    except _NOT_REACHED:
        return False
    return True


def open_listener(consume: Callable[[Any], object]) -> Any:
    """Return the handle of a new listener of this process."""
    return importlib.import_module(_MODULE).open_listener(consume)


def close_listener(handle: Any) -> None:
    """Close a listener of this process."""
    importlib.import_module(_MODULE).close_listener(handle)
    with contextlib.suppress(OSError):
        os.unlink(handle.address + _KEY_SUFFIX)


class _Connecting:
    """What scikit-learn calls to connect to a listener, with a second way where the first one fails."""

    def __init__(self, client: Callable[..., Any]) -> None:
        self.client = client

    def __call__(self, address: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return _InTurns(self.client(address, *args, **kwargs))
        except _NOT_REACHED:
            for detour in _detours:
                connection = detour.connect(address)
                if connection is not None:
                    return connection
            raise


class _InTurns:
    """A connection that the threads of a process share.

    scikit-learn has one for all of them and no lock: two threads that send at once, as those of a Dask worker do,
    would write into each other's messages, and take each other's acknowledgements.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message, and wait until it was consumed."""
        with self._lock:
            self._connection.send(message)
            self._connection.recv()

    def recv(self) -> None:
        """Do nothing: the acknowledgement is here."""

    def close(self) -> None:
        self._connection.close()


def _transport() -> ModuleType | None:
    """Return scikit-learn's module, if it is loaded and we know it."""
    module = sys.modules.get(_MODULE)
    return module if module is not None and _is_known(module) else None


def _is_known(module: ModuleType) -> bool:
    names = vars(module)
    connecting = [getattr(names.get(name), "__code__", None) for name in _CONNECTING]
    return (
        names.keys() >= _NAMES
        and getattr(names.get("ListenerHandle"), "_fields", None) == _FIELDS
        and all(code is not None and _CONNECT in code.co_names for code in connecting)
    )
