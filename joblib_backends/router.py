"""Opens the tiers of one call and makes batches ready for them.

Thread-safe. One lock guards the open tiers; another is held while a batch is encoded, which may run the user's code
(``__reduce__``), so no tier's own thread comes here.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import Any

from .config import Config
from .data.codec import Encoder, Payload
from .data.scope import ResidentScope
from .errors import DataLostError
from .tally import Tally
from .tiers import Tier, load_tier

__all__ = ["Nested", "Router"]

_log = logging.getLogger(__name__)

Nested = tuple[Any, int | None]


class Router:
    """The open tiers of one call.

    Parameters
    ----------
    config : Config
        What the user asked for.
    n_jobs : int
        Batches that may run at once.
    scope : ResidentScope
        What keeps placed buffers.
    warm : dict
        Where the context keeps what its next call should find warm; filled here.
    tally : Tally
        What is counted for the report.
    """

    def __init__(
        self, config: Config, n_jobs: int, scope: ResidentScope, warm: dict[str, object], tally: Tally
    ) -> None:
        self._config = config
        self._n_jobs = n_jobs
        self._scope = scope
        self._warm = warm
        self._tally = tally
        self._lock = threading.Lock()
        self._encoding = threading.Lock()
        self._tiers: dict[str, Tier] = {}
        self._encoder: Encoder | None = None

    def __repr__(self) -> str:
        return f"<Router {', '.join(self._tiers) or 'nothing open'}>"

    @property
    def open_tiers(self) -> list[Tier]:
        """The tiers that were used so far."""
        with self._lock:
            return list(self._tiers.values())

    def is_open(self, name: str) -> bool:
        """Return whether a tier was used so far."""
        return name in self._tiers

    def open(self, name: str) -> Tier:
        """Return the tier of this call, opened on first use."""
        tier = self._tiers.get(name)
        if tier is not None:
            return tier
        # Two threads may come here at once for the first batches; one opens, the other waits.
        with self._lock:
            if name not in self._tiers:
                tier = load_tier(name)(self._config, self._n_jobs)
                self._tiers[name] = tier
                if tier.warm is not None:
                    self._warm[name] = tier.warm
            return self._tiers[name]

    def encode(self, tier: Tier, function: Callable[[], Any], nested: Nested) -> Payload:
        """Return the payload of a batch for a tier that does not share memory.

        Raises
        ------
        TaskPicklingError
            If a function or argument cannot be pickled.
        StoreError
            If no place has room for a large buffer.
        """
        with self._encoding:
            if self._encoder is None:
                references = tier.references(self._config.scatter)
                self._encoder = Encoder(self._config, self._scope, references, tier.repeated_nbytes)
                self._scatter(tier, [value for value in self._config.scatter if id(value) not in references])
            payload = self._encoder.encode(function, nested)
        moved, pickled, saved = payload.nbytes_placed, payload.nbytes_inband, payload.nbytes_saved
        self._tally.add_payload(moved, pickled, saved, payload.encoded[1], (one.path for one in payload.residents))
        return payload

    def _scatter(self, tier: Tier, values: list[Any]) -> None:
        """Place ``values`` ahead of the first batch, once per context."""
        key = f"scattered for {tier.name}"
        if values and key not in self._warm:
            assert self._encoder is not None
            self._tally.add_payload(self._encoder.scatter(values), 0, 0)
            self._warm[key] = True

    def place_again(self, payload: Payload, fault: BaseException) -> bool:
        """Have what a batch refers to, and is not there any more, placed anew when the batch is next encoded.

        A file of the user's that a worker does not have goes there by content; returns whether that is news.

        Raises
        ------
        DataLostError
            If tasks write to it in common (``mmap_mode="r+"``): what they have written is nowhere else.
        """
        lost = self._scope.store.forget_lost(payload.residents)
        is_news = False
        path = fault.filename if isinstance(fault, DataLostError) else None
        if path is not None and self._encoder is not None and path not in {one.path for one in payload.residents}:
            is_news = self._encoder.has_path(path)
            self._encoder.send_content_of(path)
        _log.debug("%d of %d residents of a batch are gone", len(lost), len(payload.residents))
        for resident in lost:
            if resident.shared:
                raise DataLostError(
                    errno.ENOENT,
                    f"An array that tasks write to in common (mmap_mode={self._config.mmap_mode!r}) is gone, and what "
                    "they have written with it. Was its file deleted? Run the call again",
                    resident.path,
                )
        return is_news

    def leave_cluster(self, n_jobs: int) -> bool:
        """Open tiers for fewer jobs from now on; return whether batches can go there."""
        with self._encoding, self._lock:
            self._n_jobs = min(self._n_jobs, n_jobs)
            # What is on the cluster only is lost with it.
            return not any(map(load_tier("dask").is_remote, self._config.scatter))

    def abort(self) -> None:
        """Give up what runs and waits on every tier."""
        for tier in self.open_tiers:
            tier.abort()

    def close(self) -> None:
        """Give back what the tiers and the encoder of this call hold."""
        for tier in self.open_tiers:
            tier.close()
        with self._encoding:
            if self._encoder is not None:
                self._tally.costly_argument = self._encoder.costs.costliest
        self._scope.end_call()
