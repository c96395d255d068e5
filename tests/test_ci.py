"""The checks of ``ci/`` hold for the package, and each of them can fail."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


check_floors = load("check_floors")
check_doors = load("check_doors")
check_skips = load("check_skips")
host_suite = load("host_suite")


def write_package(folder, files):
    """Write the texts of ``files`` as a package called ``joblib_backends``."""
    package = folder / "joblib_backends"
    for name, text in {"__init__": "", **files}.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_the_package_keeps_its_floors(capsys):
    assert check_floors.main() == 0, capsys.readouterr().out


def test_the_package_keeps_its_doors(capsys):
    assert check_doors.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"errors": "from .config import Config"},
            "errors.py:1: imports config.py, which is not on a lower floor.",
        ),
        ({"errors": "def f():\n    from . import config"}, "errors.py:2: imports config.py"),
        ({"errors": "import joblib_backends.config"}, "errors.py:1: imports config.py"),
        ({"errors": "from joblib_backends import config"}, "errors.py:1: imports config.py"),
        ({"config": "from . import Config"}, "config.py:1: imports __init__.py"),
        ({"data/store": "from ..worker import run"}, "data/store.py:1: imports worker.py"),
        ({"data/store": "from .codec import Codec"}, "data/store.py:1: imports data/codec.py"),
        ({"tiers/dask": "from . import threads"}, "tiers/dask.py:1: imports tiers/threads.py"),
        (
            {"errors": "import importlib\nimportlib.import_module('.config', 'x')"},
            "errors.py:2: imports config.py",
        ),
        ({"errors": "from .missing import x"}, "errors.py:1: imports missing.py, which does not exist."),
        ({"utils": ""}, "utils.py: is not in the table of floors; add it to FLOORS"),
        ({"__init__": "from . import config", "config": "import joblib_backends"}, "import cycle: "),
    ],
)
def test_an_import_that_breaks_the_order_of_floors_is_found(tmp_path, capsys, files, line):
    existing = {"config": "", "worker": "", "data/codec": "", "tiers/threads": ""}
    package = write_package(tmp_path, existing | files)
    assert check_floors.main(package) == 1
    assert line in capsys.readouterr().out


def test_imports_from_lower_floors_and_from_elsewhere_pass(tmp_path):
    package = write_package(
        tmp_path,
        {
            "errors": "import os.path\nfrom collections import deque",
            "config": "from .errors import HybridError",
            "data/store": "from .. import config\nfrom ..errors import StoreError",
            "data/codec": "from .store import Store\nfrom . import store",
            "__init__": "from .data import codec",
        },
    )
    assert check_floors.violations(package) == []


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("worker", "from joblib import _dask", "joblib._dask"),
        ("worker", "import joblib._parallel_backends as b", "joblib._parallel_backends"),
        ("worker", "import joblib\njoblib.parallel._backend", "joblib.parallel._backend"),
        ("worker", "from joblib import parallel as p\np._backend", "p._backend"),
        ("worker", "import joblib\ngetattr(joblib.parallel, '_backend')", "joblib.parallel._backend"),
        ("worker", "def f(parallel):\n    parallel._aborting = True", "parallel._aborting"),
        ("backend", "import sklearn", "sklearn"),
        ("backend", "def f():\n    from sklearn.base import clone", "sklearn.base.clone"),
        ("backend", "from importlib import import_module\nimport_module('sklearn')", "sklearn"),
        ("worker", "from loky import get_reusable_executor", "loky.get_reusable_executor"),
        ("worker", "from joblib.externals import loky", "joblib.externals.loky"),
        ("backend", "import dask.array", "dask.array"),
        ("tiers/processes", "from distributed import Client", "distributed.Client"),
        ("worker", "import os\nos.environ['X'] = 'x'", "os.environ"),
        ("worker", "import os as system\nsystem.getenv('X')", "os.getenv"),
        ("worker", "from os import environ", "os.environ"),
        ("worker", "print('hello')", "print"),
        ("worker", "import sys\nsys.stderr.write('x')", "sys.stderr"),
        ("worker", "from sys import stdout", "sys.stdout"),
    ],
)
def test_what_belongs_to_another_file_is_found(tmp_path, capsys, file, text, named):
    package = write_package(tmp_path, {file: text})
    assert [line.split(": ")[1].split(" (")[0] for line in check_doors.violations(package)] == [named]
    assert check_doors.main(package) == 1
    assert f"{file}.py:{text.count(chr(10)) + 1}: {named}" in capsys.readouterr().out


def test_each_door_is_open_in_its_own_file(tmp_path):
    package = write_package(
        tmp_path,
        {
            "backend": "from joblib import parallel\nparallel._backend",
            "workers/process": "import loky\nfrom multiprocessing import process",
            "tiers/dask": "import dask, distributed\nfrom joblib import Parallel, __version__",
            "config": "import os\nos.environ",
            "report": "print('x')",
            "worker": "import sys, os\nsys.stdout.flush()\nos.fspath('x')\nself._private",
        },
    )
    assert check_doors.violations(package) == []


def test_a_package_that_loads_something_heavy_is_found(tmp_path):
    package = write_package(tmp_path, {"__init__": "import wave"})
    assert check_doors.loaded_on_import(package, ("wave", "chunk")) == [
        "import joblib_backends loads wave; import it inside the function that needs it."
    ]


def test_a_package_that_cannot_be_imported_is_found(tmp_path):
    package = write_package(tmp_path, {"__init__": "1 / 0"})
    assert "ZeroDivisionError" in check_doors.loaded_on_import(package)[0]


@pytest.mark.parametrize("check", [check_floors, check_doors])
def test_a_folder_without_files_does_not_pass(tmp_path, check):
    assert check.main(tmp_path) == 1


def write_junit(folder, name, *, skips):
    """Run a real pytest over two modules; those tests whose name holds one of ``skips`` are skipped."""
    (folder / "conftest.py").write_text(
        "import pytest\ndef pytest_collection_modifyitems(items):\n"
        f"    for item in items:\n        if any(word in item.name for word in {skips!r}):\n"
        "            item.add_marker(pytest.mark.skip(reason='not here'))\n"
    )
    (folder / "test_one.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    module_skip = "import pytest\npytest.skip('no', allow_module_level=True)\n" if "module" in skips else ""
    (folder / "test_two.py").write_text(f"{module_skip}import pytest\n@pytest.mark.xfail\ndef test_c(): assert False\n")
    path = folder / name
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", folder, "--junitxml", path]
    subprocess.run([sys.executable, "-m", "pytest", *options, folder], check=True, capture_output=True)
    return str(path)


def test_a_test_that_every_job_skips_is_found(tmp_path, capsys):
    first = write_junit(tmp_path, "first.xml", skips=["test_a", "test_b", "module"])
    second = write_junit(tmp_path, "second.xml", skips=["test_b"])
    assert check_skips.main([first, second]) == 1
    assert capsys.readouterr().out == "test_one::test_b: skipped in every job (not here).\n"


def test_a_module_that_every_job_skips_is_found(tmp_path):
    paths = [write_junit(tmp_path, name, skips=["module"]) for name in ("first.xml", "second.xml")]
    assert [line.split(":")[0] for line in check_skips.skipped_everywhere(paths)] == ["test_two"]


def test_what_ran_in_one_job_passes(tmp_path):
    first = write_junit(tmp_path, "first.xml", skips=["test_a", "module"])
    second = write_junit(tmp_path, "second.xml", skips=["test_b"])
    assert check_skips.main([first, second]) == 0


def test_checking_the_skips_of_no_job_fails():
    assert check_skips.main([]) == 1


def test_a_run_of_the_host_suite_that_selects_nothing_fails(capsys):
    """A tier must not pass because the expression, or joblib's ids, changed under us."""
    assert host_suite.main(["--tier", "inline", "-k", "no_such_test"]) == 1
    assert "pytest ended with 5" in capsys.readouterr().out


def test_every_floor_of_pyproject_is_tested_at_its_oldest_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    floors = [*project["dependencies"], *extras["dask"], *extras["sklearn"]]
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "ci" / "oldest.txt").read_text(), re.MULTILINE))
    for requirement in floors:
        name, floor = requirement.split(">=")
        assert f"{pins[name]}.".startswith(f"{floor}."), requirement
