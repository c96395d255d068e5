"""Whether workers have what the client has, in one sentence.

Versions are told apart by their first two numbers: releases that differ in the third read each other's pickles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

__all__ = ["DISTRIBUTIONS", "Difference", "differences", "lacking", "what_differs", "what_lacks"]

#: The modules of what is compared, by the names by which it is installed.
DISTRIBUTIONS: Final = {
    "joblib": "joblib",
    "cloudpickle": "cloudpickle",
    "numpy": "numpy",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "pandas": "pandas",
    "distributed": "distributed",
}

#: What workers cannot do without.
_NEEDED: Final = ("joblib", "numpy", "cloudpickle")

#: Workers that a sentence names; of more it says how many.
_MOST_NAMED: Final = 3

#: What ``abroad.survey`` returned, by worker.
Reports = Mapping[str, Mapping[str, Any]]


class Difference(NamedTuple):
    """Something that workers have in another version."""

    name: str
    here: str
    there: str


def differences(own: Mapping[str, Any], reports: Reports, package: str) -> dict[Difference, list[str]]:
    """Return what differs between this process and workers, with the addresses of those.

    Parameters
    ----------
    own : mapping
        What ``abroad.survey`` returns here.
    reports : mapping
        What it returned on each worker.
    package : str
        The name of our package.
    """
    found: dict[Difference, list[str]] = defaultdict(list)
    for address, report in reports.items():
        for name, there in report["versions"].items():
            here = own["versions"].get(name, there)
            if _first_two(here) != _first_two(there):
                found[Difference(name, here, there)].append(address)
        # What is not imported yet will be ours: a worker that joins may answer before it has been given the package.
        if report["imported"] is not None and report["source"] != own["source"]:
            other = " (of other source)" if report["imported"] == own["imported"] else ""
            found[Difference(package, own["imported"], report["imported"] + other)].append(address)
    return dict(found)


def what_differs(found: Mapping[Difference, list[str]], n_workers: int, package: str) -> str:
    """Return the sentence that tells the user."""
    parts = [
        f"{name} {there} on {_which(addresses, n_workers)} and {here} here"
        for (name, here, there), addresses in found.items()
    ]
    names = {difference.name for difference in found}
    advice = ["install the same versions there" if names - {package} else ""]
    if package in names:
        advice.append(f"restart those workers, which had imported {package} before this client came")
    return (
        f"Dask workers have other versions than this process, so tasks may fail there or give other results: "
        f"{'; '.join(parts)}; {' and '.join(filter(None, advice))}."
    )


def lacking(reports: Reports) -> dict[str, list[str]]:
    """Return what every task needs and workers do not have, with the addresses of those."""
    found: dict[str, list[str]] = defaultdict(list)
    for address, report in reports.items():
        for name in set(_NEEDED) & set(report["missing"]):
            found[name].append(address)
    return dict(found)


def what_lacks(found: Mapping[str, list[str]], n_workers: int, own: Mapping[str, Any]) -> str:
    """Return the sentence that tells the user."""
    parts = [f"{name} on {_which(addresses, n_workers)}" for name, addresses in sorted(found.items())]
    wanted = " ".join(f"{name}=={own['versions'].get(name, '*')}" for name in sorted(found))
    return f"Dask workers lack what every task needs: {'; '.join(parts)}; install {wanted} there, as it is here."


def _first_two(version: str) -> list[str]:
    return version.split(".")[:2]


def _which(addresses: list[str], n_workers: int) -> str:
    of_all = f"{len(addresses)} of {n_workers} workers"
    return of_all if len(addresses) > _MOST_NAMED else f"{of_all} ({', '.join(addresses)})"
