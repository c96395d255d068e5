"""Numbers as a person reads them."""

from __future__ import annotations

from typing import Final

__all__ = ["readable_nbytes", "readable_seconds"]

#: From which on seconds are given in a unit, what one of it has, and its name.
_UNITS: Final = ((5400.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.9995, 1.0, "s"), (0.9995e-3, 1e-3, "ms"))


def readable_nbytes(nbytes: int) -> str:
    """Return a number of bytes in a unit that a person reads."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def readable_seconds(seconds: float) -> str:
    """Return seconds in a unit that a person reads, with three digits."""
    for least, length, unit in _UNITS:
        if seconds >= least:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
