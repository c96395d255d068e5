"""The version of this package: that of the distribution, which is made from git's tags when that is built.

Not a file that the build writes: installs of one commit would differ in it (a clone may have no tags), and Dask workers
are told from the client by the source that they have.
"""

from __future__ import annotations

import functools
from typing import Final

__all__ = ["DISTRIBUTION", "version"]

#: The name by which the package is installed.
DISTRIBUTION: Final = "joblib-backends"

#: Of source on the path that nobody installed.
_UNKNOWN: Final = "0+unknown"


@functools.cache
def version() -> str:
    """Return the version of what is installed, or has travelled here (``cluster/travel.py``)."""
    # It takes 10 ms to import, and few ask for the version.
    import importlib.metadata

    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return _UNKNOWN
