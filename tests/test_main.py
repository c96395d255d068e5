"""``python -m joblib_backends``: the demo compares, ``run`` runs a script as Python would, ``info`` tells."""

import json
import os
import platform
import re
import subprocess
import sys

import joblib
import pytest

from joblib_backends import ConfigurationError, __main__
from joblib_backends.__main__ import main

LONG = 60


def run(*arguments, cwd, before=(), **variables):
    """Run ``python -m joblib_backends`` in ``cwd``, with the ``JOBLIB_BACKEND`` variables given and no others."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB")}
    return subprocess.run(
        [sys.executable, *before, "-m", "joblib_backends", *arguments],
        env={**environment, "JOBLIB_BACKEND_QUIET": "1", **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LONG,
        stdin=subprocess.DEVNULL,
    )


def script(folder, text, name="script.py"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


# ---- demo


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="the extra 'sklearn' is not installed")


def test_the_demo_finds_equal_results(sklearn, capsys):
    assert __main__.main(["demo", "--small"]) == 0
    printed = capsys.readouterr().out
    assert "of 2 combinations are equal, in all columns but times" in printed
    for name in ("n_jobs=1, no backend", "n_jobs=-1, hybrid", "tier", "reason", "ratio of times"):
        assert f"\n  {name} " in printed
    scores = [line.split("best score ")[1].split()[0] for line in printed.splitlines() if "best score" in line]
    assert scores[0] == scores[1]


def test_the_demo_fails_when_results_differ(sklearn, capsys, monkeypatch):
    monkeypatch.setattr(__main__, "_differing_columns", lambda one, other: ["mean_test_score"])
    assert __main__.main(["demo", "--small"]) == 1
    assert "of 2 combinations DIFFER in mean_test_score" in capsys.readouterr().out


def test_columns_differ_by_value_by_name_but_not_by_time():
    one = {"params": [{"C": 1}], "mean_test_score": [0.5], "mean_fit_time": [1.0]}
    assert __main__._differing_columns(one, {**one, "mean_fit_time": [2.0]}) == []
    assert __main__._differing_columns(one, {**one, "mean_test_score": [0.6]}) == ["mean_test_score"]
    assert __main__._differing_columns(one, {**one, "more": [1]}) == ["more"]


def test_the_demo_says_how_to_install_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert __main__.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "joblib_backends: The demo needs scikit-learn: pip install 'joblib-backends[sklearn]'.\n"
    )


def test_the_demo_says_what_is_wrong_in_the_environment(sklearn, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise ConfigurationError("The tier is wrong.")

    monkeypatch.setattr(__main__, "_timed_search", fail)
    assert __main__.main(["demo"]) == 2
    assert capsys.readouterr().err == "joblib_backends: The tier is wrong.\n"


# ---- run

CALL = """
from joblib import Parallel, delayed
import sys
def double(i):
    return 2 * i
if __name__ == "__main__":
    results = Parallel(n_jobs=2)(delayed(double)(i) for i in range(4))
    print(results, sys.modules["joblib_backends"].last_report().tier)
"""

#: Where no .pth file is read; the path is then ours to give.
WITHOUT_SITE = {"before": ("-S",), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize("options", [{}, WITHOUT_SITE], ids=["site", "no site"])
def test_a_function_of_the_script_runs_in_processes(tmp_path, options):
    done = run("run", str(script(tmp_path, CALL)), cwd=tmp_path, JOBLIB_BACKEND_TIER="processes", **options)
    assert (done.stdout, done.stderr) == ("[0, 2, 4, 6] processes\n", "")


def test_a_module_runs_too(tmp_path):
    script(tmp_path, CALL, "package/tool.py")
    done = run("run", "-m", "package.tool", cwd=tmp_path, JOBLIB_BACKEND_TIER="threads")
    assert (done.stdout, done.stderr) == ("[0, 2, 4, 6] threads\n", "")


LOOK = """
import sys
print(__name__, __file__, sys.argv, sys.path[0], sorted(set(globals()) - {"__annotations__"}), sep="\\n")
"""


def test_a_script_sees_what_python_would_show_it(tmp_path):
    path = script(tmp_path, LOOK, "folder/look.py")
    arguments = ["folder/look.py", "a", "--b", "-h", "--", "-m"]
    alone = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
    done = run("run", *arguments, cwd=tmp_path)
    assert done.stderr == ""
    expected, found = alone.stdout.splitlines(), done.stdout.splitlines()
    assert found[2:] == expected[2:]
    assert found[0] == expected[0] == "__main__"
    assert os.path.samefile(tmp_path / found[1], path)


def test_a_folder_with_a_main_file_runs(tmp_path):
    script(tmp_path, "import sys, beside\nprint(sys.path[0])", "folder/__main__.py")
    script(tmp_path, "", "folder/beside.py")
    assert run("run", "folder", cwd=tmp_path).stdout == "folder\n"


def test_the_environment_chooses_another_backend(tmp_path):
    path = script(tmp_path, "import joblib\nprint(type(joblib.parallel.get_active_backend()[0]).__name__)")
    assert run("run", str(path), cwd=tmp_path).stdout == "HybridBackend\n"
    assert run("run", str(path), cwd=tmp_path, JOBLIB_BACKEND="threading").stdout == "ThreadingBackend\n"


def test_children_of_the_script_get_the_backend_too(tmp_path):
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    look = "import joblib; print(type(joblib.parallel.get_active_backend()[0]).__name__)"
    assert run("run", str(script(tmp_path, code)), look, cwd=tmp_path).stdout == "HybridBackend\n"


def test_the_script_sets_the_exit_code(tmp_path):
    assert run("run", str(script(tmp_path, "raise SystemExit(7)")), cwd=tmp_path).returncode == 7


def test_an_error_of_the_script_keeps_its_traceback(tmp_path):
    code = "import joblib\njoblib.Parallel(n_jobs=2)"
    done = run("run", str(script(tmp_path, code)), cwd=tmp_path, JOBLIB_BACKEND="nothing")
    assert done.returncode == 1
    assert 'script.py", line 2' in done.stderr
    assert "JOBLIB_BACKEND is 'nothing', but must be one of" in done.stderr


def test_a_script_that_is_not_there_is_one_sentence(capsys):
    assert __main__.main(["run", "nowhere.py"]) == 2
    assert capsys.readouterr().err == (
        "joblib_backends: The script 'nowhere.py' cannot be run, because there is no such file.\n"
    )


def test_a_wrong_number_of_jobs_is_one_sentence(tmp_path):
    done = run("run", str(script(tmp_path, "")), cwd=tmp_path, JOBLIB_BACKEND_N_JOBS="all")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "JOBLIB_BACKEND_N_JOBS is 'all', but must be a whole number other than 0" in done.stderr


# ---- info


def test_info_says_what_a_bug_report_should(capsys):
    assert __main__.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("versions", "joblib ", "cores available", "room for data", "environment", "tiers", "processes"):
        assert word in printed


def test_info_as_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JOBLIB_BACKEND_TIER", "threads")
    monkeypatch.setenv("JOBLIB_BACKENDS_OF_OTHERS", "hidden")
    assert __main__.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["versions", "machine", "room for data", "environment", "tiers"]
    assert found["environment"] == {"JOBLIB_BACKEND_PROFILE": "off", "JOBLIB_BACKEND_TIER": "threads"}
    assert found["machine"]["cores available"] >= 1
    assert found["tiers"]["processes"] == "can be used"
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    monkeypatch.undo()


def test_info_says_what_a_tier_lacks(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "joblib_backends.tiers.dask", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert __main__.main(["info", "--json"]) == 0
    assert "pip install 'joblib-backends[dask]'" in json.loads(capsys.readouterr().out)["tiers"]["dask"]


def test_a_package_that_is_not_installed_is_no_error():
    assert __main__._version("no-such-distribution") == "not installed"


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["run"]])
def test_a_wrong_command_line_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main(arguments)
    assert "usage: python -m joblib_backends" in capsys.readouterr().err


# ---- checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """Return the path of a checkpoint with eight tasks of ``abs``."""
    path = tmp_path / "search.ckpt"
    with joblib.parallel_backend("hybrid", tier="threads", n_jobs=2, checkpoint=path):
        joblib.Parallel()(joblib.delayed(abs)(-i) for i in range(8))
    return path


def test_checkpoint_show_says_what_is_in_a_file(checkpoint, capsys):
    assert main(["checkpoint", "show", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"entries +8, ", shown)
    assert re.search(r"abs +8 entries, ", shown)
    assert re.search(rf"made with +python {platform.python_version_tuple()[0]}\..*: 8 entries", shown)


def test_checkpoint_show_gives_json(checkpoint, capsys):
    assert main(["checkpoint", "show", "--json", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["functions"]["abs"]["entries"] == 8


@pytest.mark.parametrize(
    ("options", "n_deleted"),
    [([], 0), (["--all"], 8), (["--function", "abs"], 8), (["--function", "len"], 0), (["--older-than", "1"], 0)],
)
def test_checkpoint_prune_deletes_what_is_asked_for(checkpoint, capsys, options, n_deleted):
    assert main(["checkpoint", "prune", str(checkpoint), *options]) == 0
    assert capsys.readouterr().out == f"{n_deleted} entries deleted from {checkpoint}\n"
    assert main(["checkpoint", "show", "--json", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 8 - n_deleted


@pytest.mark.parametrize("verb", ["show", "prune"])
def test_a_checkpoint_that_cannot_be_used_is_refused(tmp_path, capsys, verb):
    assert main(["checkpoint", verb, str(tmp_path / "none")]) == 2
    assert "there is no such file" in capsys.readouterr().err
