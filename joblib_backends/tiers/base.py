"""The contract of a tier, and the table of tiers.

To add a tier, write one class and register it::

    class SparkTier(Tier):
        name = "spark"
        shares_memory = False

        @classmethod
        def capacity(cls, config): ...           # how many batches can run at once
        def __init__(self, config, n_jobs): ...  # open: one object per call
        def submit(self, work): ...              # -> Future, at once, from any thread
        def outcome(self, future): ...           # what a finished future means: an Outcome, or raise
        def abort(self): ...                     # give up what runs and waits
        def close(self): ...                     # the call is over

    register_tier("spark", "my_package.spark:SparkTier")

The scheduler does the rest: the n_jobs limit, order, completion, errors, joblib's callbacks. The tests'
``tier`` fixture runs the same contract tests over every name of the table.
"""

from __future__ import annotations

import functools
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..budget import Share, share_of
from ..config import Config
from ..data.codec import Payload, RemoteReference, Wire
from ..errors import ConfigurationError, MissingDependencyError
from ..worker import Outcome

__all__ = ["Tier", "Work", "load_tier", "loaded_tier", "register_tier", "tier_names"]


@dataclass(frozen=True)
class Work:
    """A batch on its way to a tier: the call itself where memory is shared, a payload elsewhere."""

    function: Callable[[], list[Any]]
    #: What the tasks are, for messages.
    name: str
    #: What the batch may use.
    share: Share
    payload: Payload | None = None
    #: Returns what it is called where people see it among others: the function with its estimator, and which tasks.
    label: Callable[[], tuple[str, str]] = lambda: ("", "")

    @property
    def wire(self) -> Wire:
        """What travels, where memory is not shared."""
        assert self.payload is not None
        return self.payload.sent_with(self.share)


class Tier(ABC):
    """A place where the batches of one call run.

    Parameters
    ----------
    config : Config
        What the user asked for.
    n_jobs : int
        Batches that may run at once.

    Notes
    -----
    Thread-safe: the scheduler calls ``submit`` from the caller's thread and from its own, ``abort`` and ``close``
    from any. A future may be completed in any thread; done-callbacks of the scheduler submit the next batch and put
    the future in a queue, and run no code of the user.
    What a task did, success or failure, is an :class:`~joblib_backends.worker.Outcome`; ``outcome`` raises only
    when the tier itself failed, and then one of our own errors: foreign exceptions are translated there.
    """

    #: The name in the table and in reports.
    name: ClassVar[str]

    #: Whether workers see the parent's objects; then batches are called as they are, and no payload is made.
    shares_memory: ClassVar[bool]

    #: Whether ``submit`` runs the batch itself; it is then called by the thread that asks for the result.
    runs_in_caller: ClassVar[bool] = False

    #: Whether a batch that is handed over ahead of time waits for one worker, and so may wait for a long batch while
    #: another worker is idle. Then nothing is handed over ahead where results are wanted in the order of their end.
    binds_early: ClassVar[bool] = False

    #: Tasks per job to take from the user's generator ahead of time, where joblib's default of 2 lets workers wait for
    #: the network. A ``pre_dispatch`` that the user gave is never changed.
    pre_dispatch_per_job: ClassVar[int | None] = None

    #: Bytes from which buffers are placed that several tasks have, where ``max_nbytes`` was left as it is: where bytes
    #: travel far, less than that pays.
    repeated_nbytes: ClassVar[int | None] = None

    @classmethod
    @abstractmethod
    def capacity(cls, config: Config) -> int:
        """Return how many batches can run at once: what ``n_jobs=-1`` means here."""

    @classmethod
    def hold(cls, config: Config) -> object:
        """Return what the context is to hold before its first call opens the tier; None for nothing."""
        del config
        return None

    @classmethod
    def share(cls, config: Config, cores: int) -> Share:
        """Return what a batch may use where this tier runs it, if so many cores, or ``n_slots``, are left for it."""
        return share_of(config, cores)

    @classmethod
    def is_available(cls) -> bool:
        """Return whether the tier could be used now without being asked for; "auto" looks at Dask's answer."""
        return True

    @classmethod
    def is_remote(cls, value: Any) -> bool:
        """Return whether a scattered value is on the workers only, and cannot be had without them."""
        return False

    @classmethod
    def start_workers(cls, config: Config, n_jobs: int, packages: frozenset[str]) -> None:
        """Have workers started in the background for calls to come, with ``packages`` imported; returns at once."""
        del config, n_jobs, packages

    @classmethod
    def ready_counter(cls, config: Config) -> Callable[[], int]:
        """Return what tells, at any time, how many workers are there.

        A tier whose workers take no time to start has them all.
        """
        return functools.partial(cls.capacity, config)

    @classmethod
    def startup_seconds(cls) -> float | None:
        """Return how long workers took to start when that was last measured, or None."""
        return None

    @abstractmethod
    def __init__(self, config: Config, n_jobs: int) -> None: ...

    @property
    def look_ahead(self) -> int:
        """Batches to hand over beyond ``n_jobs``, so that no worker waits for the next; they must not run yet."""
        return 0

    @property
    def n_slots(self) -> int | None:
        """Return what the batches of a call share elsewhere; None where they share the cores of this machine."""
        return None

    @property
    def warm(self) -> object:
        """What to hold until the context ends, so that its next call finds workers running; None for nothing."""
        return None

    def references(self, values: Sequence[Any]) -> dict[int, RemoteReference]:
        """Return what to send in the place of those scattered values that are on the workers already, by ``id``."""
        return {}

    @abstractmethod
    def submit(self, work: Work) -> Future[Any]:
        """Start a batch, or queue it, and return its future at once."""

    @abstractmethod
    def outcome(self, future: Future[Any]) -> Outcome:
        """Return what became of a batch whose future is done. Called in the scheduler's completion thread."""

    @abstractmethod
    def abort(self) -> None:
        """Give up what waits and, where possible, what runs; idempotent. No result is wanted any more."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the call used; idempotent. Nothing runs any more."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


#: Third parties and built-ins enter by the same door: a name and where its class is, loaded on first use.
_TABLE: Final[dict[str, str]] = {}

#: What an ImportError of a tier means to its user.
_EXTRAS: Final = {"distributed": "dask", "dask": "dask"}


def register_tier(name: str, path: str) -> None:
    """Make a tier selectable as ``tier=name``.

    Parameters
    ----------
    name : str
        The name, lower case.
    path : str
        Where the class is, as ``"package.module:Class"``. It is imported when the tier is first used.

    Raises
    ------
    ConfigurationError
        If the name is "auto", or the path is not of that form.
    """
    module, _, attribute = path.partition(":")
    if name == "auto" or not name or not module or not attribute:
        raise ConfigurationError(
            f"The tier {name!r} at {path!r} cannot be registered: give a name other than 'auto' and a path of the "
            "form 'package.module:Class'."
        )
    _TABLE[name] = path


def tier_names() -> list[str]:
    """Return the names that ``tier=`` accepts, "auto" first."""
    return ["auto", *sorted(_TABLE)]


def load_tier(name: str) -> type[Tier]:
    """Return the class of a tier.

    Raises
    ------
    ConfigurationError
        If no tier has that name.
    MissingDependencyError
        If it needs a package that is not installed.
    """
    if name not in _TABLE:
        raise ConfigurationError.not_one_of("tier", name, tier_names())
    module, _, attribute = _TABLE[name].partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(missing)
        advice = f"pip install 'joblib-backends[{extra}]'" if extra else f"Install {missing or 'what it needs'}"
        raise MissingDependencyError(f"tier={name!r} needs the package {missing!r}: {error}. {advice}.") from error
    except AttributeError as error:
        raise ConfigurationError(f"The tier {name!r} at {_TABLE[name]!r} cannot be loaded: {error}.") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Tier)):
        raise ConfigurationError(f"The tier {name!r} at {_TABLE[name]!r} is {loaded!r}, which is not a Tier.")
    return loaded


def loaded_tier(name: str) -> type[Tier] | None:
    """Return the class of a tier if it was loaded before, else None; loading one may take 10 ms."""
    module, _, attribute = _TABLE[name].partition(":")
    loaded: type[Tier] | None = getattr(sys.modules.get(module), attribute, None)
    return loaded


for _name, _class in {
    "inline": "InlineTier",
    "threads": "ThreadsTier",
    "processes": "ProcessesTier",
    "dask": "DaskTier",
    "fake": "FakeTier",
}.items():
    register_tier(_name, f"{__package__}.{_name}:{_class}")
