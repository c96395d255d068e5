"""Clients of Dask: the one that is active, a new one, and questions to either that end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Final

import distributed
from distributed.utils_comm import gather_from_workers

from ..config import Config
from ..errors import ClusterUnavailableError, ConfigurationError

__all__ = [
    "Holders",
    "active_client",
    "address_and_certificates",
    "check_blocks",
    "check_is_of_this_process",
    "close",
    "connect",
    "descriptions",
    "future_of",
    "is_alive",
    "nthreads",
    "register_plugin",
    "run_on_workers",
    "start_gather",
    "unsubscribe",
]

_log = logging.getLogger(__name__)

#: What a question to a scheduler that is gone, or going, ends with.
GONE: Final = (OSError, TimeoutError, RuntimeError, ValueError)

#: Seconds that the end of a client may take that has not connected.
_CLOSE_S: Final = 5.0

#: Seconds that results may be on their way before it is asked who has them: mostly all are here by then.
_SOON_S: Final = 0.2

#: The workers that have each of some results.
Holders = Mapping[str, Collection[str]]

#: States of a client that has, or may get back, its connection.
_ALIVE: Final = ("running", "connecting")

#: The clients of the parent in a forked child: their threads were left behind, and what is asked of them never ends.
_inherited: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


class _Client(distributed.Client):
    """A client that is closed if it cannot be made.

    Dask leaves that to its finalizer, which takes a lock that the thread may have in which the collector comes by.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        except BaseException:
            with contextlib.suppress(Exception):
                self.close(timeout=_CLOSE_S)  # type: ignore[no-untyped-call]
            raise


def close(client: Any) -> None:
    """Close a client of ours, and end the thread of its event loop.

    One that has closed itself, because its scheduler did not come back, is closed for Dask, whose ``close`` then leaves
    that thread, with three descriptors, for as long as the process lives. No finalizer may come here: the same lock.
    """
    client.close()
    if client.status == "closed" and not client.asynchronous:
        client._loop_runner.stop()


def active_client() -> Any:
    """Return the client that is active in this process, or None."""
    try:
        client = distributed.Client.current()  # type: ignore[no-untyped-call]
    except ValueError:
        return None
    is_usable = client.status == "running" and not client.asynchronous and client not in _inherited
    return client if is_usable else None


def connect(config: Config, address: str, timeout_s: float) -> Any:
    """Return a new client of the scheduler at ``address``, which ``config`` names.

    Raises
    ------
    ClusterUnavailableError
        If none answers within ``timeout_s`` seconds, or it turns us away.
    ConfigurationError
        If that is no address.
    """
    source = "" if config.scheduler in (address, None) else f", which scheduler={str(config.scheduler)!r} stands for,"
    security = {} if config.security is None else {"security": config.security}
    try:
        return _Client(address, timeout=timeout_s, set_as_default=False, **security)
    except (OSError, TimeoutError) as error:
        raise ClusterUnavailableError(
            f"No Dask scheduler answered at {address!r}{source} within wait_for_workers={timeout_s:g} seconds: is the "
            "address right, is the scheduler running, and if it wants TLS, does security= have the certificates?"
        ) from error
    except (ValueError, TypeError) as error:
        # TypeError: tls:// without a certificate.
        raise ConfigurationError(
            f"scheduler is {address!r}, but must be an address such as 'tcp://host:8786', or 'tls://host:8786' with "
            f"certificates in security=: {error}."
        ) from error


def address_and_certificates(config: Config, address: str) -> tuple[str, ...]:
    """Return what a connection to a named scheduler depends on: who has other certificates, or none, gets another."""
    given = config.security
    security = distributed.Security() if given is None else given  # type: ignore[no-untyped-call]
    certificates = security.get_tls_config_for_role("client")
    return address, str(security.require_encryption), *sorted(map(str, certificates.items()))


def check_blocks(client: Any) -> None:
    """Refuse a client whose methods return before they have done what they do."""
    if getattr(client, "asynchronous", False):
        raise ConfigurationError(
            f"client is {client!r}, which is asynchronous, but joblib calls block: use Client(..., "
            "asynchronous=False) in a thread without an event loop."
        )


def check_is_of_this_process(client: Any) -> None:
    """Refuse a client that was made before this process was forked.

    Raises
    ------
    ClusterUnavailableError
        If it was.
    """
    if client in _inherited:
        raise ClusterUnavailableError(
            f"client is {client!r} of the parent process, and a forked process such as this one, {os.getpid()}, has no "
            "part in its connection: name the cluster by scheduler= instead, or start processes by another method "
            "than fork."
        )


def future_of(client: Any, value: Any) -> Any:
    """Return the future of a Dask collection, computed in one place of the cluster; a future is its own."""
    return value if isinstance(value, distributed.Future) else client.compute(value)


def is_alive(client: Any) -> bool:
    """Return whether a client is connected, or trying to be."""
    return client.status in _ALIVE


def start_gather(client: Any, keys: Sequence[str], note_holders: Callable[[Holders], object]) -> Future[dict[str, Any]]:
    """Have the results of finished tasks fetched; those that cannot be had are left out.

    Not ``Client.gather``: it merges what several callers ask for, and one of them that stops waiting ends it for all of
    them, for the user too, whose client this may be.

    Parameters
    ----------
    client : distributed.Client
        The client.
    keys : sequence
        Of the tasks.
    note_holders : callable
        Called on the client's event loop with the workers that have each result, unless all are here before long.

    Returns
    -------
    concurrent.futures.Future
        With the results by key.
    """
    fetched = _gather(client, list(keys), note_holders)
    try:
        return asyncio.run_coroutine_threadsafe(fetched, client.loop.asyncio_loop)
    except BaseException:
        fetched.close()
        raise


async def _gather(client: Any, keys: list[str], note_holders: Callable[[Holders], object]) -> dict[str, Any]:
    if client.direct_to_workers:
        holders = await client.scheduler.who_has(keys=keys)
        note_holders(holders)
        fetched = await gather_from_workers(holders, rpc=client.rpc)
        return {str(key): result for key, result in fetched[0].items()}
    through_scheduler = asyncio.ensure_future(_gather_through_scheduler(client, keys))
    try:
        done, _ = await asyncio.wait([through_scheduler], timeout=_SOON_S)
        if not done:
            with contextlib.suppress(*GONE):
                note_holders(await client.scheduler.who_has(keys=keys))
        return await through_scheduler
    finally:
        through_scheduler.cancel()


async def _gather_through_scheduler(client: Any, keys: list[str]) -> dict[str, Any]:
    while keys:
        answer = await client.scheduler.gather(keys=keys)
        if answer["status"] == "OK":
            return dict(answer["data"])
        # All or nothing: it names those that are lost.
        lost = set(answer["keys"])
        keys = [key for key in keys if key not in lost]
    return {}


def register_plugin(client: Any, plugin: Any, timeout_s: float, *, again: bool = False) -> None:
    """Have all workers, or nannies, get a plugin, and those that join later; some may get it later than this returns.

    As ``Client.register_plugin`` does, which cannot be told how long to wait.

    Parameters
    ----------
    client : distributed.Client
        The client.
    plugin : WorkerPlugin or NannyPlugin
        The plugin.
    timeout_s : float
        Seconds to wait for all of them.
    again : bool, default=False
        Whether to give it also to those that should have it.
    """
    is_for_nannies = isinstance(plugin, distributed.NannyPlugin)
    scheduler = client.scheduler
    register = scheduler.register_nanny_plugin if is_for_nannies else scheduler.register_worker_plugin
    try:
        client.sync(
            register,
            plugin=pickle.dumps(plugin, protocol=5),
            name=plugin.name,
            idempotent=plugin.idempotent and not again,
            callback_timeout=timeout_s,
        )
    except (TimeoutError, OSError) as error:
        # A worker that dies meanwhile. If it is the scheduler, who asks it next is told.
        _log.debug("The plugin %s may not be on all workers: %s", plugin.name, error)


def unsubscribe(client: Any, topic: str) -> None:
    """Hear no more of a topic, and let go of who heard of it: a client never forgets whom it was to call."""
    # What is on its way here yet is for somebody all the same, or Dask would complain of it.
    client.subscribe_topic(topic, _ignore)
    client.unsubscribe_topic(topic)


def _ignore(event: object) -> None:
    """Do nothing."""


def run_on_workers(
    client: Any, function: Callable[..., Any], workers: Collection[str], *args: Any, timeout_s: float
) -> dict[str, Any]:
    """Return what a function returns on each of some workers, by address; without those that fail or do not answer.

    Each is asked by itself, for one that does not answer within ``timeout_s`` seconds would cost the answers of all.
    """
    if not workers:
        return {}
    answers = client.sync(_ask_each, client, function, list(workers), args, timeout_s)
    return {worker: answer for worker, answer in zip(workers, answers, strict=True) if answer is not _NO_ANSWER}


_NO_ANSWER: Final = object()


async def _ask_each(
    client: Any, function: Callable[..., Any], workers: Sequence[str], args: Sequence[Any], timeout_s: float
) -> list[Any]:
    async def ask(worker: str) -> Any:
        try:
            asked = client._run(function, *args, workers=[worker], on_error="ignore")
            return (await asyncio.wait_for(asked, timeout_s)).get(worker, _NO_ANSWER)
        except (TimeoutError, *GONE, CancelledError):
            return _NO_ANSWER

    return list(await asyncio.gather(*map(ask, workers)))


def nthreads(client: Any, timeout_s: float) -> dict[str, int]:
    """Return the threads of each worker of a cluster, by address.

    Raises
    ------
    ClusterUnavailableError
        If the scheduler does not answer within ``timeout_s`` seconds.
    """
    with _answering(client, timeout_s):
        return dict(client.sync(client.scheduler.ncores, workers=None, callback_timeout=timeout_s))


def descriptions(client: Any, timeout_s: float) -> dict[str, Mapping[str, Any]]:
    """Return what the scheduler knows of each worker, by address: "name", "host", "nthreads", "resources" and more.

    Not ``Client.scheduler_info``, which answers with what the last of several questions was about.

    Raises
    ------
    ClusterUnavailableError
        If the scheduler does not answer within ``timeout_s`` seconds.
    """
    with _answering(client, timeout_s):
        return dict(client.sync(client.scheduler.identity, callback_timeout=timeout_s)["workers"])


@contextlib.contextmanager
def _answering(client: Any, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except (*GONE, AttributeError) as error:  # AttributeError: a client that was closed has no scheduler
        raise ClusterUnavailableError(
            f"The Dask scheduler of {client!r} did not answer within {timeout_s:g} seconds: is it still running?"
        ) from error


def _leave_to_parent() -> None:
    # No public attribute of a client tells where it was made. Without this one, questions end when their time is up.
    _inherited.update(getattr(distributed.Client, "_instances", ()))
    # Dask's one thread for long messages stays behind, too; its pool would wait for it for ever.
    if hasattr(distributed.utils, "_offload_executor"):
        distributed.utils._offload_executor = ThreadPoolExecutor(1, thread_name_prefix="Dask-Offload")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
