"""Check that no test is skipped in every job: what never runs anywhere protects nothing.

Usage: ``python ci/check_skips.py JOB1.xml JOB2.xml ...`` with the files that ``pytest --junitxml`` wrote;
prints one line per test that no job ran and exits with 1 if there is one. An expected failure counts as run.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tests that none of the files in ``arguments`` ran; return 1 if there are any, else 0."""
    paths = [Path(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if not paths:
        print("check_skips needs at least one file written by pytest --junitxml.")
        return 1
    found = skipped_everywhere(paths)
    for line in found:
        print(line)
    if not found:
        print(f"skips: every test ran in at least one of {len(paths)} jobs.")
    return int(bool(found))


def skipped_everywhere(paths: Iterable[Path]) -> list[str]:
    """Return one line for each test that was skipped wherever it was collected, and for an empty file."""
    found = []
    ran: set[str] = set()
    skipped: dict[str, str] = {}
    for path in paths:
        cases = list(ElementTree.parse(path).iter("testcase"))
        if not cases:
            found.append(f"{path}: holds no test, so nothing was checked.")
        for case in cases:
            reason = _skip_reason(case)
            if reason is None:
                ran |= {_name(case), case.get("classname", "")}
            else:
                skipped[_name(case)] = reason
    # A module that skips as a whole is one case named after the module, which its tests carry where they ran.
    never = {name: why for name, why in skipped.items() if name not in ran}
    return found + [f"{name}: skipped in every job ({why})." for name, why in never.items()]


def _name(case: ElementTree.Element) -> str:
    return "::".join(filter(None, (case.get("classname"), case.get("name"))))


def _skip_reason(case: ElementTree.Element) -> str | None:
    skip = case.find("skipped")
    if skip is None or skip.get("type") == "pytest.xfail":
        return None
    return skip.get("message", "no reason given")


if __name__ == "__main__":
    sys.exit(main())
