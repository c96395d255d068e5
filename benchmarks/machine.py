"""What the numbers depend on besides the code: machine, versions, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("joblib", "loky", "distributed", "scikit-learn", "numpy", "scipy", "pandas", "joblib-backends")

#: A load average above this at the start means that something else runs.
QUIET_LOAD = 0.5


def describe_machine() -> dict[str, Any]:
    """Return the machine, the versions and the load average."""
    import numpy  # noqa: F401  (loads the BLAS that is listed)
    from threadpoolctl import threadpool_info

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "blas": [f"{pool['internal_api']} {pool['version']}" for pool in threadpool_info()],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Return the description of the machine as one line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    commit = f" ({machine['commit']})" if machine.get("commit") else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores (load {machine['load_average']:.1f} at the start), "
        f"Python {machine['python']}, {packages}{commit}; BLAS {', '.join(machine['blas'])}; {machine['date']}"
    )


def load_warning(machine: dict[str, Any]) -> str:
    """Return what to say when the machine is not quiet, or an empty text."""
    load = machine["load_average"]
    if load <= QUIET_LOAD:
        return ""
    return f"WARNING: the load average was {load:.2f} at the start: other work ran, and these numbers prove little."


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
