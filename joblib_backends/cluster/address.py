"""From what names a cluster to the address of its scheduler."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Final, NamedTuple

import dask.config

from ..config import Config, variables_of_others
from ..errors import ClusterUnavailableError, ConfigurationError
from .local import LocalCluster

__all__ = ["Named", "address_of", "is_named", "named_scheduler"]

#: What ``scheduler=`` is for a cluster on this machine that is started on request.
_LOCAL: Final = "local"

#: Seconds between two looks for a scheduler file.
_LOOK_S: Final = 0.05

#: Seconds for which a file that is there may not have been written to its end.
_WRITING_S: Final = 2.0


def is_named(config: Config) -> bool:
    """Return whether ``config`` names a scheduler, or leaves it to Dask's own configuration, which does."""
    return config.scheduler is not None or (config.tier == "dask" and _configured() is not None)


class Named(NamedTuple):
    """What names the scheduler of calls, if anything does."""

    name: str | None
    source: str | None
    used_by: str


def named_scheduler(config: Config) -> Named:
    """Return what names a scheduler; nobody is asked whether it is there, and no cluster is started."""
    if config.scheduler is not None:
        return Named(os.fspath(config.scheduler), "scheduler=, or JOBLIB_BACKEND_SCHEDULER", "every call")
    configured = _configured()
    if configured is None:
        return Named(None, None, "no call, unless a distributed.Client is active or given")
    variable = "DASK_SCHEDULER_ADDRESS"
    source = variable if variables_of_others().get(variable) == configured else "Dask's configuration"
    return Named(configured, source, "every call" if config.tier == "dask" else "calls with tier='dask'")


def address_of(config: Config, timeout_s: float) -> str:
    """Return the address of the scheduler that is named.

    A local cluster is started if there is none. A scheduler file is read each time: a scheduler that was started again
    has written another address.

    Raises
    ------
    ClusterUnavailableError
        If there is no scheduler file within ``timeout_s`` seconds, or the local cluster does not start.
    ConfigurationError
        If the file is none that a scheduler has written.
    """
    if config.scheduler is None:
        return str(_configured())
    named = os.path.expanduser(os.fspath(config.scheduler))
    if named == _LOCAL:
        return LocalCluster.address_for(config)
    is_path = "://" not in named and (named.endswith(".json") or os.path.isfile(named))
    return _read(Path(named), timeout_s) if is_path else named


def _configured() -> str | None:
    """Return ``DASK_SCHEDULER_ADDRESS``, or what one of Dask's files says instead."""
    return dask.config.get("scheduler-address", None) or None


def _read(path: Path, timeout_s: float) -> str:
    started = time.monotonic()
    while True:
        waited = time.monotonic() - started
        try:
            return str(json.loads(path.read_text())["address"])
        except FileNotFoundError:
            if waited >= timeout_s:
                raise ClusterUnavailableError(
                    f"There was no scheduler file {str(path)!r} within wait_for_workers={timeout_s:g} seconds: is it "
                    "the path that was given to dask scheduler --scheduler-file, on a disk that both machines see?"
                ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            if waited >= min(timeout_s, _WRITING_S):
                raise ConfigurationError(
                    f"scheduler is {str(path)!r}, but must be a file that dask scheduler --scheduler-file has written, "
                    f"or an address such as 'tcp://host:8786': {type(error).__name__}: {error}."
                ) from error
        time.sleep(_LOOK_S)
