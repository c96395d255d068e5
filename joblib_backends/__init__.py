"""One joblib backend, "hybrid", for threads, processes and Dask clusters.

Importing the package registers the backend::

    import joblib_backends
    from joblib import parallel_backend

    with parallel_backend("hybrid", scatter=[X, y]):
        GridSearchCV(pipe, grid, n_jobs=-1).fit(X, y)
"""

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
from .report import CallReport, last_report
from .thread_safety import thread_safe
from .tiers import register_tier

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
    "thread_safe",
]

__version__ = "0.1.0"

_register("hybrid", HybridBackend)
