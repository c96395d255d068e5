"""Run joblib's own tests of Parallel over our backend, once for "auto" and for each local tier.

joblib parametrizes ``joblib/test/test_parallel.py`` over every registered backend, so importing ours before
the collection makes that suite our conformance kit. This file is both the command and the pytest plugin.

Usage: ``python ci/host_suite.py [--tier threads] [--whole] [-k EXPRESSION]``; prints a table and exits with 1
if a test failed or if nothing was selected.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TIERS = ("auto", "inline", "threads", "processes")

_UNKNOWN_NAME = (
    "joblib's own loky workers start without our package, so a name that the parent registered is unknown there; "
    "so it is for every backend that is registered by an import"
)
_ONE_AFTER_THE_OTHER = (
    "needs tasks that run while the caller does something else; joblib leaves out its sequential backend, too"
)

#: Tests that cannot hold for our backend: name -> the tiers concerned, and a reason that a joblib developer accepts.
DESELECTED: dict[str, tuple[tuple[str, ...], str]] = {
    "test_nested_loop[loky-hybrid]": (TIERS, _UNKNOWN_NAME),
    "test_nested_loop[back_compat_backend-hybrid]": (TIERS, _UNKNOWN_NAME),
    "test_parallel_timeout_fail_with_generator[generator-hybrid]": (("inline",), _ONE_AFTER_THE_OTHER),
    "test_parallel_unordered_generator_returns_fastest_first[hybrid-2]": (("inline",), _ONE_AFTER_THE_OTHER),
    "test_parallel_unordered_generator_returns_fastest_first[hybrid-4]": (("inline",), _ONE_AFTER_THE_OTHER),
}

#: Seconds for one test and for one tier. joblib's slowest test needs 15; reaching these means a hang.
TEST_TIMEOUT_S = 120
TIER_TIMEOUT_S = 900

_TIER = "JOBLIB_BACKEND_TIER"
_WHOLE = "JOBLIB_HOST_SUITE_WHOLE"


@dataclass(frozen=True)
class Outcome:
    """What one run of the suite gave."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: tuple[str, ...]
    output: str


def pytest_configure(config: Any) -> None:
    """Register the backend before joblib's tests are collected."""
    import joblib_backends  # noqa: F401


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests that run our backend, by name or as an instance, less those of ``DESELECTED``."""
    whole = _WHOLE in os.environ
    left_out = _left_out(os.environ[_TIER])
    kept = [item for item in items if item.name not in left_out and (whole or _is_over_our_backend(item))]
    dropped = [item for item in items if item not in kept]
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def _left_out(tier: str) -> dict[str, str]:
    return {name: reason for name, (tiers, reason) in DESELECTED.items() if tier in tiers}


def _is_over_our_backend(item: Any) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    modules = {type(value).__module__.partition(".")[0] for value in parameters}
    return "hybrid" in item.name or "joblib_backends" in modules


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite on each tier; return 1 if one of them failed or ran nothing, else 0."""
    parser = argparse.ArgumentParser(description="Run joblib's test_parallel.py over the hybrid backend.")
    parser.add_argument("--tier", action="append", choices=TIERS, help="only this tier; may be repeated")
    parser.add_argument("--whole", action="store_true", help="also the tests of joblib's own backends")
    parser.add_argument("-k", metavar="EXPRESSION", dest="expression", default="", help="passed to pytest")
    parser.add_argument("--junit", metavar="FOLDER", type=Path, help="keep the junit files there")
    options = parser.parse_args(arguments)
    outcomes = {}
    for tier in options.tier or TIERS:
        outcome = run(tier, whole=options.whole, expression=options.expression, junit=options.junit)
        outcomes[tier] = outcome
        if outcome.failed or not outcome.passed:
            print(outcome.output)
    print(table(outcomes))
    return int(any(outcome.failed or not outcome.passed for outcome in outcomes.values()))


def run(tier: str, *, whole: bool = False, expression: str = "", junit: Path | None = None) -> Outcome:
    """Run joblib's tests with ``tier`` as the default tier of our backend."""
    with tempfile.TemporaryDirectory(prefix="host_suite") as scratch:
        report = (junit or Path(scratch)).resolve() / f"joblib-{tier}.xml"
        report.parent.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                [*_command(scratch, report), *(("-k", expression) if expression else ())],
                cwd=scratch,
                env=_environment(tier, whole),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=TIER_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode(errors="replace")
            return Outcome(0, 1, 0, TIER_TIMEOUT_S, ("the whole run: no end in time",), text)
        return _outcome(report, done)


def table(outcomes: dict[str, Outcome]) -> str:
    """Return one line per tier, and below them the name of each failed test."""
    lines = [f"{'tier':<12}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for tier, outcome in outcomes.items():
        counts = f"{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}{outcome.seconds:>9.1f}"
        lines.append(f"{tier:<12}{counts}")
    lines += [f"failed on {tier}: {name}" for tier, outcome in outcomes.items() for name in outcome.failures]
    lines += [f"left out on {tier}: {name}: {why}" for tier in outcomes for name, why in _left_out(tier).items()]
    return "\n".join(lines)


def _command(scratch: str, report: Path) -> list[str]:
    # joblib lies in the environment's site-packages; when the environment lies inside this repository, pytest
    # would walk up from there and apply our own settings to joblib's tests.
    settings = Path(scratch, "pytest.ini")
    settings.write_text("[pytest]\nmarkers =\n    thread_unsafe: joblib's own\n    no_cover: joblib's own\n")
    return [
        *(
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(settings),
            "--rootdir",
            scratch,
            "-p",
            "no:cacheprovider",
        ),
        *("-p", Path(__file__).stem, "--timeout", str(TEST_TIMEOUT_S), "--junitxml", str(report)),
        *("-q", "--tb=short", "-ra", "--pyargs", "joblib.test.test_parallel"),
    ]


def _environment(tier: str, whole: bool) -> dict[str, str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB_")}
    environment[_TIER] = tier
    # Workers and the scripts that joblib's tests start must find the package too.
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent)))
    return {**environment, _WHOLE: "1"} if whole else environment


def _outcome(report: Path, done: subprocess.CompletedProcess[str]) -> Outcome:
    if not report.exists():
        return Outcome(0, 1, 0, 0.0, (f"the whole run: pytest ended with {done.returncode}",), done.stdout)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [case.get("name") or "collection" for case in failures]
    if done.returncode not in (0, 1):  # 5: nothing was selected; 2 to 4: pytest itself was stopped or failed.
        names.append(f"the whole run: pytest ended with {done.returncode}")
    passed = len(cases) - len(failures) - len(skipped)
    seconds = sum(float(case.get("time", 0)) for case in cases)
    return Outcome(passed, len(names), len(skipped), seconds, tuple(names), done.stdout)


if __name__ == "__main__":
    sys.exit(main())
