"""What a bug report should say of the place where a program runs: nothing is started, and nobody is asked.

All is made of what JSON can hold, by section. Memory and room are bytes; ``None`` is what is not known, or not there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from .budget import available_cores, is_daemonic, numerical_libraries
from .config import (
    Config,
    activation_from_environment,
    max_cpu_count_variable,
    profile_path,
    temp_folder_from_environment,
    variables_of_others,
    variables_set,
)
from .errors import ConfigurationError, HybridError
from .memory import available_nbytes, memory_nbytes
from .outlook import outlook
from .tiers import load_tier, tier_names
from .version import DISTRIBUTION, version

__all__ = ["surroundings"]

_DISTRIBUTIONS: Final = (
    "joblib",
    "loky",
    "numpy",
    "cloudpickle",
    "threadpoolctl",
    "xxhash",
    "scikit-learn",
    "scipy",
    "pandas",
    "pyarrow",
    "dask",
    "distributed",
)

#: The module that acts on ``JOBLIB_BACKEND`` when Python starts, beside its .pth file.
_HOOK: Final = "_joblib_backends_hook"

#: Where Linux mounts control groups; below it, quotas of the second version and of the first.
_GROUPS: Final = Path("/sys/fs/cgroup")


def surroundings() -> dict[str, Any]:
    """Return what there is, by section."""
    return {
        "versions": {
            "python": platform.python_version(),
            DISTRIBUTION: version(),
            **{name: version_of(name) for name in _DISTRIBUTIONS},
        },
        "machine": _machine(),
        "room for data": {place: _room(place) for place in _places()},
        "libraries": numerical_libraries(),
        "dask": _dask(),
        "environment": variables_set(),
        "variables of others": variables_of_others(),
        "defaults": _defaults(),
        "auto": _outlook(),
        "tiers": {name: _state_of_tier(name) for name in tier_names() if name != "auto"},
    }


def version_of(distribution: str) -> str:
    """Return the version of what is installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "implementation": platform.python_implementation(),
        "cores available": available_cores(Config()),
        "cores in all": os.cpu_count(),
        "cores by affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cores by quota": _quota(),
        "LOKY_MAX_CPU_COUNT": max_cpu_count_variable(),
        "memory": memory_nbytes(),
        "free memory": available_nbytes(),
        "may start processes": not is_daemonic(),
    }


def _quota() -> float | None:
    """Return the cores that the control groups around this process allow, as joblib and the kernel see them."""
    own = _own_group()
    folders = [_GROUPS / own, *(_GROUPS / own).parents] if own else [_GROUPS]
    quotas = [_quota_in(folder) for folder in folders if folder == _GROUPS or _GROUPS in folder.parents]
    return min((quota for quota in quotas if quota is not None), default=None)


def _own_group() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")


def _quota_in(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return round(int(quota) / int(period), 2)
    except (OSError, ValueError):  # no such file, or "max"
        pass
    try:
        quota_us = int((folder / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return round(quota_us / period_us, 2) if quota_us > 0 and period_us > 0 else None


def _places() -> list[str]:
    places = [temp_folder_from_environment(), "/dev/shm", tempfile.gettempdir()]
    return list(dict.fromkeys(place for place in places if place and os.path.isdir(place)))


def _room(place: str) -> dict[str, Any]:
    usage = shutil.disk_usage(place)
    return {"free": usage.free, "total": usage.total, "writable": os.access(place, os.W_OK | os.X_OK)}


def _dask() -> dict[str, Any]:
    try:
        from .cluster.address import named_scheduler
    except ImportError as error:
        return {"distributed": "not installed", "problem": str(error)}
    facts: dict[str, Any] = {"distributed": version_of("distributed")}
    try:
        found = named_scheduler(Config.from_options({}))
    except ConfigurationError as error:
        return {**facts, "problem": str(error)}
    return {**facts, "scheduler": found.name, "named by": found.source, "used by": found.used_by}


def _defaults() -> dict[str, Any]:
    """Return what ``JOBLIB_BACKEND`` does to programs that do not name a backend."""
    facts: dict[str, Any] = {
        "hook": "installed"
        if importlib.util.find_spec(_HOOK)
        else "not installed: JOBLIB_BACKEND does nothing here without `python -m joblib_backends run`",
        "profile": str(profile_path() or "off"),
    }
    try:
        activation = activation_from_environment()
    except ConfigurationError as error:
        return {**facts, "problem": str(error)}
    if activation is None:
        return {**facts, "default backend": "joblib's own: JOBLIB_BACKEND is not set"}
    n_jobs = 1 if activation.n_jobs is None else activation.n_jobs
    return {**facts, "default backend": activation.backend, "n_jobs=None means": n_jobs}


def _outlook() -> dict[str, Any]:
    try:
        config = Config.from_options({})
        if config.tier != "auto":
            load_tier(config.tier)
        found = outlook(config)
    except HybridError as error:
        return {"problem": str(error)}
    return {
        kind: {"tiers": list(one.tiers), "begins": one.begins, "reason": one.reason, "words": one.words}
        for kind, one in found.items()
    }


def _state_of_tier(name: str) -> str:
    try:
        load_tier(name)
    except HybridError as error:
        return str(error)
    return "can be used"
