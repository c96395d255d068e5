"""The wheel holds what it should, installs the hook where Python reads it, and the package shows what it promises."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import joblib_backends

ROOT = Path(__file__).resolve().parent.parent
LONG = 120


def run(*command, **variables):
    """Return what a command prints on stdout; it must end well."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB")}
    done = subprocess.run(
        [str(part) for part in command],
        env={**environment, **variables},
        cwd=sysconfig.get_path("data"),
        capture_output=True,
        text=True,
        timeout=LONG,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for tool in ("build", "hatchling"):
        pytest.importorskip(tool, reason="the extra 'dev' is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Return the interpreter and the site-packages of a new environment with the wheel, and our dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # Paths added by a .pth file are not searched for further .pth files: only the wheel's hook is there.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python, site_packages


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package_and_the_hook(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "joblib_backends").rglob("*.py")}
    expected = {*files, "joblib_backends/py.typed", "joblib_backends.pth", "_joblib_backends_hook.py"}
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == expected


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    assert f"\nVersion: {joblib_backends.__version__}\n" in metadata
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata
    for extra in ("dask", "sklearn", "all"):
        assert f"\nProvides-Extra: {extra}\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names_in(wheel))


CALL = "import joblib; print(type(joblib.parallel.get_active_backend()[0]).__name__)"


def test_an_installed_wheel_is_active_in_an_unmodified_program(environment):
    python, site_packages = environment
    assert (site_packages / "joblib_backends.pth").is_file()
    code = f"{CALL}; import joblib_backends; print(joblib_backends.__file__)"
    done = run(python, "-c", code, JOBLIB_BACKEND="hybrid", JOBLIB_BACKEND_QUIET="1")
    assert done.stdout.splitlines() == ["HybridBackend", str(site_packages / "joblib_backends" / "__init__.py")]
    assert done.stderr == ""
    assert run(python, "-c", CALL).stdout == "LokyBackend\n"


def test_what_an_incomplete_removal_leaves_is_silent(environment):
    """The test takes the environment apart, so it comes last of those that use it."""
    python, site_packages = environment
    (site_packages / "dependencies.pth").unlink()
    joblib = "VALUE = 1"
    (site_packages / "joblib").mkdir()
    (site_packages / "joblib" / "__init__.py").write_text(joblib)
    (site_packages / "_joblib_backends_hook.py").unlink()
    done = run(python, "-c", "import joblib; print(joblib.VALUE)", JOBLIB_BACKEND="hybrid")
    assert (done.stdout, done.stderr) == ("1\n", "")
    run(sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "joblib-backends")
    assert not (site_packages / "joblib_backends.pth").exists()


def test_public_names_are_sorted_and_complete():
    visible = {
        name
        for name, value in vars(joblib_backends).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert visible == set(joblib_backends.__all__)
    assert joblib_backends.__all__ == sorted(joblib_backends.__all__)
    assert len(joblib_backends.__all__) <= 14


def test_public_names_have_docstrings():
    for name in joblib_backends.__all__:
        assert (getattr(joblib_backends, name).__doc__ or "").strip(), name


def test_the_version_is_that_of_the_distribution():
    assert importlib.metadata.version("joblib-backends") == joblib_backends.__version__


def test_importing_the_package_imports_no_optional_dependency():
    code = (
        "import sys, joblib_backends; print({'sklearn', 'dask', 'distributed', 'pandas', 'pyarrow'} & {*sys.modules})"
    )
    assert run(sys.executable, "-c", code).stdout == "set()\n"
