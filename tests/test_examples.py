"""Each example runs as it stands, and prints the results that it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the extra 'sklearn' is not installed")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LONG = 150


def run(name, *arguments, cwd):
    """Return what an example prints; it must end well."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LONG,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reported_tiers(printed):
    return re.findall(r"^  tier     (.+), n_jobs=\d+$", printed, re.MULTILINE)


def test_every_example_has_a_test_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'run("{path.stem}"' not in tests] == []


def test_array_job(tmp_path):
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    printed = run("array_job", cwd=tmp_path)
    assert re.findall(r"^(\w+): 64 rows, equal to the plain loop: True$", printed, re.MULTILINE) == [
        "threads",
        "processes",
        "dask",
    ]
    assert reported_tiers(printed) == ["threads", "processes", "dask"]
    # The array of 51.2 MB is placed once for all tasks.
    assert printed.count("bytes    51.2 MB moved") == 2


def test_grid_search_pca(tmp_path):
    printed = run("grid_search_pca", "--small", cwd=tmp_path)
    assert "18 combinations of 1000 x 50\n" in printed
    assert float(re.search(r"^best score (\S+) with", printed, re.MULTILINE)[1]) > 0.7


def test_svc_search(tmp_path):
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    printed = run("svc_search", cwd=tmp_path)
    assert len(re.findall(r"best score 0\.9\d+ with .+, equal to one core: True$", printed, re.MULTILINE)) == 3
    assert reported_tiers(printed)[-1] == "dask"


def test_cross_validation(tmp_path):
    printed = run("cross_validation", cwd=tmp_path)
    scores = re.findall(r"^(.+): (0\.9\d+) \+/- 0\.\d+ over 10 folds$", printed, re.MULTILINE)
    assert [name for name, _ in scores] == ["logistic regression", "SVC", "random forest"]


def test_clustering_memmap(tmp_path):
    printed = run("clustering_memmap", cwd=tmp_path)
    found = re.search(r"^1600000 points in 8 clusters, centres within (\S+)$", printed, re.MULTILINE)
    assert float(found[1]) < 0.1
    assert "data 640 MB, limit 400 MB for each process" in printed
    assert "every process below the limit: True" in printed
    assert reported_tiers(printed) == ["processes"]
    assert "bytes    0 B moved" in printed
