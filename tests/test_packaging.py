"""The wheel holds what it should, installs the hook where Python reads it, and the package shows what it promises."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import joblib_backends
from joblib_backends.version import version

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
def built(tmp_path_factory):
    """Return the sdist and the wheel, both made from the tree."""
    for tool in ("build", "hatchling", "hatch_vcs"):
        pytest.importorskip(tool, reason="the extra 'dev' is not installed")
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--sdist", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(built):
    return built[1]


def installed(distribution, folder):
    """Return the interpreter and the site-packages of a new environment with ``distribution``, and our dependencies."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # Paths added by a .pth file are not searched for further .pth files: only the hook of the distribution is there.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    # An sdist is built with what is there, too.
    options = ("-q", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "--ignore-installed", distribution)
    return python, site_packages


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("environment"))


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def version_of(wheel):
    return wheel.name.split("-")[1]


def test_the_wheel_holds_every_file_of_the_package_and_the_hook(wheel):
    sources = (path for kind in ("py", "html", "css", "js") for path in (ROOT / "joblib_backends").rglob(f"*.{kind}"))
    files = {path.relative_to(ROOT).as_posix() for path in sources}
    expected = {*files, "joblib_backends/py.typed", "joblib_backends.pth", "_joblib_backends_hook.py"}
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == expected


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    assert f"\nVersion: {version_of(wheel)}\n" in metadata
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata
    for extra in ("dask", "sklearn", "all"):
        assert f"\nProvides-Extra: {extra}\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names_in(wheel))


def test_an_index_would_take_both(built):
    pytest.importorskip("twine", reason="the extra 'dev' is not installed")
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_sdist_holds_what_its_tests_need(built):
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("joblib_backends/py.typed", "pth/joblib_backends.pth", "tests/conftest.py", "ci/test.sh", "CITATION.cff")
    assert {*wanted, "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "PKG-INFO"} <= held


CALL = "import joblib; print(type(joblib.parallel.get_active_backend()[0]).__name__)"


def check_that_it_is_active(python, site_packages, version):
    assert (site_packages / "joblib_backends.pth").is_file()
    code = f"{CALL}; import joblib_backends; print(joblib_backends.__file__, joblib_backends.__version__)"
    done = run(python, "-c", code, JOBLIB_BACKEND="hybrid", JOBLIB_BACKEND_QUIET="1", PYTHONPATH="")
    package = site_packages / "joblib_backends"
    assert done.stdout.splitlines() == ["HybridBackend", f"{package / '__init__.py'} {version}"]
    assert done.stderr == ""
    assert (package / "py.typed").is_file()
    assert run(python, "-c", CALL, PYTHONPATH="").stdout == "LokyBackend\n"


def test_an_installed_wheel_is_active_in_an_unmodified_program(environment, wheel):
    check_that_it_is_active(*environment, version_of(wheel))


def test_an_installed_sdist_is_active_in_an_unmodified_program(built, tmp_path):
    """Its version is in it: git is not asked, and the tree that it is built in has none."""
    sdist, wheel = built
    check_that_it_is_active(*installed(sdist, tmp_path), version_of(wheel))


def test_what_an_incomplete_removal_leaves_is_silent(environment):
    """The test takes the environment apart, so it comes last of those that use it."""
    python, site_packages = environment
    (site_packages / "dependencies.pth").unlink()
    joblib = "VALUE = 1"
    (site_packages / "joblib").mkdir()
    (site_packages / "joblib" / "__init__.py").write_text(joblib)
    (site_packages / "_joblib_backends_hook.py").unlink()
    done = run(python, "-c", "import joblib; print(joblib.VALUE)", JOBLIB_BACKEND="hybrid", PYTHONPATH="")
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
    assert len(joblib_backends.__all__) <= 15


def test_public_names_have_docstrings():
    for name in joblib_backends.__all__:
        assert (getattr(joblib_backends, name).__doc__ or "").strip(), name


def test_the_version_is_that_of_the_distribution():
    assert importlib.metadata.version("joblib-backends") == joblib_backends.__version__


def test_source_that_nobody_installed_has_a_version_too(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert version.__wrapped__() == "0+unknown"


def test_the_version_without_tags_and_git_is_before_the_one_that_comes_next():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert settings["fallback-version"] == f"{first[1]}.dev0"


@pytest.fixture
def repository(tmp_path):
    """Return a repository of one commit, with what decides about the version."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("pyproject.toml", ".gitattributes", ".git_archival.txt"):
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    return folder


def git(folder, *arguments):
    return run("git", "-C", folder, *arguments)


def versions(repository, folder):
    """Return the version of a clone, and of an archive, which has no git."""
    pytest.importorskip("hatch_vcs", reason="the extra 'dev' is not installed")
    archive = folder / "archive"
    archive.mkdir()
    git(repository, "archive", "--output", folder / "archive.tar", "HEAD")
    shutil.unpack_archive(folder / "archive.tar", archive, filter="data")
    code = "import os, sys; os.chdir(sys.argv.pop()); from hatchling.cli import hatchling; sys.exit(hatchling())"
    return [run(sys.executable, "-c", code, "version", place).stdout.strip() for place in (repository, archive)]


def test_the_version_is_that_of_the_tag(repository, tmp_path):
    git(repository, "tag", "v3.2.1")
    assert versions(repository, tmp_path) == ["3.2.1", "3.2.1"]


def test_a_repository_without_tags_has_a_version(repository, tmp_path):
    of_clone, of_archive = versions(repository, tmp_path)
    fallback = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]["fallback-version"]
    assert of_archive == fallback
    assert re.fullmatch(rf"{re.escape(fallback.removesuffix('0'))}1\+g[0-9a-f]+", of_clone)


def test_importing_the_package_imports_no_optional_dependency():
    code = (
        "import sys, joblib_backends; print({'sklearn', 'dask', 'distributed', 'pandas', 'pyarrow'} & {*sys.modules})"
    )
    assert run(sys.executable, "-c", code).stdout == "set()\n"
