"""One joblib backend, "hybrid", for threads, processes and Dask clusters.

Importing the package registers the backend::

    import joblib_backends
    from joblib import parallel_backend

    with parallel_backend("hybrid", scatter=[X, y]):
        GridSearchCV(pipe, grid, n_jobs=-1).fit(X, y)
"""

import typing as _typing

from joblib import register_parallel_backend as _register

from .backend import HybridBackend
from .errors import (
    BatchTimeoutError,
    ClusterLostError,
    ClusterUnavailableError,
    ConfigurationError,
    HybridError,
    RecoveryWarning,
    TaskPicklingError,
    TaskTimeoutError,
    WorkerLostError,
)
from .report import CallReport, last_report, reports
from .thread_safety import thread_safe
from .tiers import register_tier
from .version import version as _version

__all__ = [
    "BatchTimeoutError",
    "CallReport",
    "ClusterLostError",
    "ClusterUnavailableError",
    "ConfigurationError",
    "HybridBackend",
    "HybridError",
    "RecoveryWarning",
    "TaskPicklingError",
    "TaskTimeoutError",
    "WorkerLostError",
    "last_report",
    "register_tier",
    "reports",
    "thread_safe",
]

__version__: str

if not _typing.TYPE_CHECKING:  # or every misspelt name of the package would be one

    def __getattr__(name: str) -> str:
        if name == "__version__":
            return _version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register("hybrid", HybridBackend)
