"""What the workers of a cluster are given before they get work, and what is said about what they have.

::

    caller's thread     provide: the plugin to scheduler and workers, then a survey of those that are there
                        tell:    one warning about what differs
    client's loop       a worker says what it has, when it has been given the package: one that joins, mostly
    crew                tell, for what the loop has heard

Nothing here waits for longer than ``wait_s``: a worker that does not answer gets the package when it does, and a batch
that comes to it earlier is sent again (``lacks_package``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from ..crew import Crew
from ..errors import EnvironmentWarning, MissingDependencyError
from . import abroad
from .client import GONE, register_plugin
from .placement import Placement
from .travel import PACKAGE, PLUGIN_PREFIX, FromSource, luggage
from .versions import DISTRIBUTIONS, Difference, differences, lacking, what_differs, what_lacks

__all__ = ["Outfit", "lacks_package"]

_log = logging.getLogger(__name__)

#: Where workers say what they have.
_TOPIC: Final = f"{PACKAGE}-arrivals"


@dataclass
class _Cluster:
    """What this process knows of the workers of a scheduler: connections come and go with contexts."""

    #: What workers have, by address: each is asked once, unless it lacks something.
    reports: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    #: What the user was told: nobody must be told the same each time.
    told: set[Difference | str] = field(default_factory=set)


class Outfit:
    """What a connection has given to the workers of its cluster. Thread-safe.

    Parameters
    ----------
    client : distributed.Client
        The client.
    wait_s : float
        Seconds that workers may take to answer.
    placement : Placement
        Which workers matter.
    is_provided : bool, default=False
        Whether another client has given it to them.
    """

    #: Guards what is known, and news; nothing of anybody else's runs under it.
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _clusters: ClassVar[dict[str, _Cluster]] = {}
    #: Who is to hear what workers say, by client: that has one handler for a topic.
    _of_client: ClassVar[weakref.WeakKeyDictionary[Any, weakref.WeakSet[Outfit]]] = weakref.WeakKeyDictionary()

    def __init__(self, client: Any, wait_s: float, placement: Placement, *, is_provided: bool = False) -> None:
        self._client = client
        self._wait_s = wait_s
        self._placement = placement
        self._own = _own_survey()
        self._is_provided = self._is_surveyed = is_provided
        self._is_lacking = False
        self._scheduler: str | None = None
        self._cluster = _Cluster()
        self._news: list[str] = []

    def __repr__(self) -> str:
        return (
            f"<Outfit of {len(self._cluster.reports)} workers, {'provided' if self._is_provided else 'not provided'}>"
        )

    def provide(self) -> bool:
        """Have every worker given the package, unless that was done; those that join later get it when they do.

        Returns
        -------
        bool
            Whether this is another scheduler than the last time.

        Raises
        ------
        MissingDependencyError
            If workers lack what every task needs.
        OSError, TimeoutError, RuntimeError, ValueError
            If the scheduler cannot be reached.
        """
        if self._is_provided:
            return False
        before = self._scheduler
        self._listen()
        self._register(luggage(_TOPIC, dict(DISTRIBUTIONS)))
        # Before the question who is there: who joins while it is answered is not taken for gone.
        with self._lock:
            known = dict(self._cluster.reports)
        present = frozenset(self._placement.slots(self._client, self._wait_s))
        new = self._survey({a for a in present if a not in known or lacking({a: known[a]})})
        with self._lock:
            reports = self._cluster.reports
            for address in known.keys() - present:
                reports.pop(address, None)
            reports |= new
            found = lacking(reports)
            if found:
                raise MissingDependencyError(what_lacks(found, len(reports), self._own))
            self._note(reports)
            self._is_surveyed = self._is_provided = True
        return before is not None and self._scheduler != before

    def lapse(self, *, is_lacking: bool = False) -> None:
        """Provide again before the next batch: there may be another scheduler, or a worker is lacking the package."""
        self._is_provided = False
        self._is_lacking |= is_lacking

    def _listen(self) -> None:
        with self._lock:
            listening = self._of_client.setdefault(self._client, weakref.WeakSet())
            listening.add(self)
        self._client.subscribe_topic(_TOPIC, functools.partial(_hear, listening))

    def _register(self, plugin: Any) -> None:
        # As Client.register_plugin does, which cannot be told how long to wait.
        answer = self._client.run_on_scheduler(
            FromSource(abroad.make_way), prefix=PLUGIN_PREFIX, name=plugin.name, callback_timeout=self._wait_s
        )
        with self._lock:
            self._scheduler = answer["scheduler"]
            self._cluster = self._clusters.setdefault(answer["scheduler"], _Cluster())
        # A scheduler that has it gives it to nobody again, unless it is told to: no need to send it the package.
        is_lacking, self._is_lacking = self._is_lacking, False
        if is_lacking or not answer["is_there"]:
            register_plugin(self._client, plugin, self._wait_s, again=is_lacking)

    def _survey(self, workers: Collection[str]) -> dict[str, Mapping[str, Any]]:
        """Ask workers what they have; some may not answer."""
        if not workers:
            return {}
        try:
            reports = self._client.run(
                FromSource(abroad.survey),
                PACKAGE,
                dict(DISTRIBUTIONS),
                workers=sorted(workers),
                on_error="ignore",
                callback_timeout=self._wait_s,
            )
        except GONE as error:
            _log.debug("Not all workers of %r said what they have: %s", self._client, error)
            return {}
        return dict(reports)

    def _note(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what is to be said about workers: each thing once, however many have it. Under the lock."""
        told, n_workers = self._cluster.told, len(self._cluster.reports)
        differing = differences(self._own, reports, PACKAGE)
        differing = {difference: where for difference, where in differing.items() if difference not in told}
        if differing:
            self._news.append(what_differs(differing, n_workers, PACKAGE))
        missing = {name: where for name, where in lacking(reports).items() if name not in told}
        if missing:
            self._news.append(what_lacks(missing, n_workers, self._own))
        told |= {*differing, *missing}

    def hear(self, address: str, report: Mapping[str, Any]) -> None:
        """Note what a worker has said that it has. Called on the client's event loop."""
        with self._lock:
            self._cluster.reports[address] = report
            # Those that are there from the start are spoken of together.
            if self._is_surveyed:
                self._note({address: report})
            has_news = bool(self._news) and self._is_surveyed
        if has_news:
            # Not here: the user may have put code in the place of what shows warnings.
            Crew.shared().run(self._tell_quietly)

    def _tell_quietly(self) -> None:
        with contextlib.suppress(EnvironmentWarning):  # a filter makes it an error, for which nobody waits
            self.tell()

    def tell(self) -> None:
        """Warn of what has not been said yet."""
        with self._lock:
            news, self._news = self._news, []
        for sentence in news:
            warnings.warn(sentence, EnvironmentWarning, stacklevel=2)


@functools.cache
def _own_survey() -> Mapping[str, Any]:
    return abroad.survey(PACKAGE, DISTRIBUTIONS)


def _hear(listening: weakref.WeakSet[Outfit], event: tuple[float, Any]) -> None:
    """Tell the outfits of a client what a worker has. Called on its event loop; it never forgets whom it calls."""
    with Outfit._lock:
        outfits = list(listening)
    for outfit in outfits:
        outfit.hear(event[1]["address"], event[1]["report"])


def lacks_package(error: BaseException | None) -> bool:
    """Return whether a task failed because its worker does not have this package."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == PACKAGE


def _forget_in_child() -> None:
    # A thread of the parent may have held it.
    Outfit._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
