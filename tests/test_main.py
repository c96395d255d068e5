"""``python -m joblib_backends``: the demo compares, ``run`` runs a script as Python would, ``info`` tells."""

import json
import os
import platform
import re
import subprocess
import sys

import joblib
import pytest
from joblib import Parallel, delayed, parallel_backend

import joblib_backends
from joblib_backends import ConfigurationError, __main__, last_report, surroundings
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


SECTIONS = [
    *("versions", "machine", "room for data", "libraries", "dask", "environment", "variables of others"),
    *("defaults", "auto", "tiers"),
]


def told(capsys):
    """Return what ``info --json`` prints: one object, and nothing else."""
    assert main(["info", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_info_says_what_a_bug_report_should(capsys):
    assert __main__.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("joblib ", "joblib-backends ", "cores available", "cores by quota", "processes", *SECTIONS):
        assert word in printed
    assert re.search(r"^  memory +[0-9.]+ [MGT]B$", printed, re.MULTILINE)
    assert re.search(r"^  your functions +begins inline, then the cheapest of", printed, re.MULTILINE)


def test_info_as_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JOBLIB_BACKEND_TIER", "threads")
    monkeypatch.setenv("JOBLIB_BACKENDS_OF_OTHERS", "hidden")
    found = told(capsys)
    assert list(found) == SECTIONS
    assert found["environment"] == {"JOBLIB_BACKEND_PROFILE": "off", "JOBLIB_BACKEND_TIER": "threads"}
    assert found["machine"]["cores available"] >= 1
    assert found["machine"]["memory"] >= found["machine"]["free memory"] > 0
    assert found["tiers"]["processes"] == "can be used"
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["joblib-backends"] == joblib_backends.__version__
    assert {one["begins"] for kind, one in found["auto"].items() if kind != "require='sharedmem'"} == {"threads"}
    monkeypatch.undo()


def test_info_tells_of_libraries_and_of_what_limits_them(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = told(capsys)
    assert found["variables of others"]["OMP_NUM_THREADS"] == "3"
    assert "blas" in {one["user_api"] for one in found["libraries"]}
    assert all(one["num_threads"] >= 1 for one in found["libraries"])


def test_info_tells_of_room(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path))
    found = told(capsys)
    (first, room), *_ = found["room for data"].items()
    assert first == str(tmp_path)
    assert 0 < room["free"] <= room["total"]
    assert room["writable"]


# ---- info: what auto would do


def test_info_says_what_auto_would_do_and_why(capsys, monkeypatch):
    monkeypatch.setattr("joblib_backends.outlook.available_cores", lambda config: 4)
    found = told(capsys)["auto"]
    assert found["scikit-learn's own"]["tiers"] == ["inline", "threads", "processes"]
    assert found["your functions"]["tiers"] == ["inline", "processes"]
    assert "not known to be safe on threads" in found["your functions"]["reason"]
    assert found["require='sharedmem'"]["tiers"] == ["inline", "threads"]
    assert found["client=, scheduler="]["begins"] == "dask"
    assert found["in a Dask client"]["tiers"] == ["inline", "dask"]


def test_one_core_is_a_plain_loop(capsys, monkeypatch):
    monkeypatch.setattr("joblib_backends.outlook.available_cores", lambda config: 1)
    found = told(capsys)["auto"]
    assert found["your functions"]["words"] == "inline: there is one core, so n_jobs=-1 is a plain loop of joblib's"
    assert found["client=, scheduler="]["begins"] == "dask"


def test_what_info_foretells_is_what_a_call_does(capsys):
    found = told(capsys)["auto"]["your functions"]
    before = joblib_backends.last_report()
    with joblib.parallel_backend("hybrid", n_jobs=2):
        joblib.Parallel()(joblib.delayed(len)("ab") for _ in range(2))
    report = joblib_backends.last_report()
    assert report is not before
    assert report.tier == "inline"
    assert found["begins"] == "inline"


def test_info_says_what_is_wrong_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("JOBLIB_BACKEND", "hybrid")
    monkeypatch.setenv("JOBLIB_BACKEND_N_JOBS", "all")
    monkeypatch.setenv("JOBLIB_BACKEND_TIER", "nonsense")
    found = told(capsys)
    assert "JOBLIB_BACKEND_N_JOBS is 'all'" in found["defaults"]["problem"]
    assert "'nonsense', but must be one of" in found["auto"]["problem"]
    assert main(["info"]) == 0
    assert "problem " in capsys.readouterr().out
    monkeypatch.setenv("JOBLIB_BACKEND_RETRIES", "many")
    assert "JOBLIB_BACKEND_RETRIES is 'many'" in told(capsys)["auto"]["problem"]


def test_info_says_which_backend_programs_get(capsys, monkeypatch):
    assert told(capsys)["defaults"]["default backend"] == "joblib's own: JOBLIB_BACKEND is not set"
    monkeypatch.setenv("JOBLIB_BACKEND", "threading")
    monkeypatch.setenv("JOBLIB_BACKEND_N_JOBS", "-1")
    found = told(capsys)["defaults"]
    assert (found["default backend"], found["n_jobs=None means"]) == ("threading", -1)


# ---- info: Dask


def test_info_says_what_a_tier_lacks(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "joblib_backends.tiers.dask", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert __main__.main(["info", "--json"]) == 0
    assert "pip install 'joblib-backends[dask]'" in json.loads(capsys.readouterr().out)["tiers"]["dask"]


def test_info_without_dask(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "joblib_backends.cluster.address", raising=False)
    monkeypatch.setitem(sys.modules, "dask", None)
    assert told(capsys)["dask"]["distributed"] == "not installed"


@pytest.mark.parametrize(
    ("variables", "told_of_it"),
    [
        ({}, (None, None, "no call, unless a distributed.Client is active or given")),
        (
            {"DASK_SCHEDULER_ADDRESS": "tcp://nowhere:1"},
            ("tcp://nowhere:1", "DASK_SCHEDULER_ADDRESS", "calls with tier='dask'"),
        ),
        (
            {"DASK_SCHEDULER_ADDRESS": "tcp://nowhere:1", "JOBLIB_BACKEND_TIER": "dask"},
            ("tcp://nowhere:1", "DASK_SCHEDULER_ADDRESS", "every call"),
        ),
        (
            {"JOBLIB_BACKEND_SCHEDULER": "local"},
            ("local", "scheduler=, or JOBLIB_BACKEND_SCHEDULER", "every call"),
        ),
    ],
)
def test_info_names_the_scheduler_and_asks_nobody(capsys, monkeypatch, variables, told_of_it):
    config = pytest.importorskip("dask.config", reason="the extra 'dask' is not installed")
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    configured = {"scheduler-address": variables.get("DASK_SCHEDULER_ADDRESS")}
    monkeypatch.setattr("distributed.Client.__init__", None)  # to call it would fail
    monkeypatch.setattr("joblib_backends.cluster.local.LocalCluster.address_for", None)
    with config.set(configured):
        found = told(capsys)
    assert (found["dask"]["scheduler"], found["dask"]["named by"], found["dask"]["used by"]) == told_of_it
    if "JOBLIB_BACKEND_SCHEDULER" in variables:
        assert found["auto"]["your functions"]["reason"] == "the Dask scheduler local was given"


def test_a_quota_is_the_smallest_around_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(surroundings, "_GROUPS", tmp_path)
    monkeypatch.setattr(surroundings, "_own_group", lambda: "outer/inner")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    assert surroundings._quota() is None
    (tmp_path / "outer" / "inner" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "outer" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert surroundings._quota() == 1.5


def test_a_package_that_is_not_installed_is_no_error():
    assert surroundings.version_of("no-such-distribution") == "not installed"


# ---- the command line


COMMANDS = [[], ["demo"], ["run"], ["info"], ["checkpoint"], ["checkpoint", "show"], ["checkpoint", "prune"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_says_what_a_command_does_how_it_is_called_and_what_it_exits_with(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    shown = capsys.readouterr().out
    usage, description, *_ = shown.split("\n\n")
    assert usage.startswith(" ".join(["usage: python -m joblib_backends", *command]))
    assert len(description) > 100
    examples, codes = shown.split("\nexamples:\n")[1].split("\nexit codes:\n")
    assert all(line.lstrip().partition(" joblib_backends ")[1] for line in examples.splitlines() if line)
    assert "0  " in codes or command == ["run"]


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
    found = json.loads(capsys.readouterr().out)
    assert found["functions"]["abs"]["entries"] == found["entries"] == 8
    assert found["oldest"] <= found["newest"]


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
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys, verb):
    path = script(tmp_path, "not a checkpoint, whatever its name is\n", "search.ckpt")
    path.chmod(0o600)
    assert main(["checkpoint", verb, str(path)]) == 2
    printed = capsys.readouterr()
    assert str(path) in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("verb", ["show", "prune"])
def test_a_checkpoint_that_cannot_be_used_is_refused(tmp_path, capsys, verb):
    assert main(["checkpoint", verb, str(tmp_path / "none")]) == 2
    printed = capsys.readouterr()
    assert "there is no such file" in printed.err
    assert printed.out == ""


# ---- report


@pytest.fixture
def trace(tmp_path):
    """Return the path of a trace of two calls, of three tasks and of four."""
    path = tmp_path / "run.json"
    with parallel_backend("hybrid", tier="threads", n_jobs=2, trace=path):
        for n in (3, 4):
            Parallel()(delayed(abs)(-i) for i in range(n))
    return path


def test_report_prints_what_the_calls_of_a_trace_did(trace, capsys):
    assert main(["report", str(trace)]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("abs: 3 tasks in ")
    assert second.startswith("abs: 4 tasks in ")
    assert "  tier     threads, n_jobs=2" in second


def test_report_makes_a_page_of_the_last_call_or_of_the_one_that_is_asked_for(trace, capsys):
    page = trace.with_suffix(".html")
    for options, n_tasks in (([], 4), (["--call", "1"], 3)):
        assert main(["report", str(trace), "--html", str(page), *options]) == 0
        assert f'<span id="n-tasks">{n_tasks}</span>' in page.read_text()
    assert capsys.readouterr().out.count("abs: ") == 3


def test_report_in_json_has_every_figure(trace, capsys):
    assert main(["report", str(trace), "--json"]) == 0
    calls = json.loads(capsys.readouterr().out)
    assert [(call["function"], call["tasks"], call["n_jobs"]) for call in calls] == [("abs", 3, 2), ("abs", 4, 2)]
    assert calls[-1] == last_report().to_dict()


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (None, [], "cannot be read: No such file"),
        ("{}", [], "is no trace of this package, as trace= writes them"),
        ('[{"cat": "call", "args": null}]', [], "is no trace of this package"),
        ('[{"cat": "call", "args": {"call": 0, "report": {"seconds": 1}}}]', [], "is no trace of this package"),
        pytest.param("[" * 100_000, [], "is no trace of this package", id="deep"),
        ("trace", ["--call", "3"], "There is no call 3 in"),
        ("trace", ["--html", "/none/such/page.html"], "The page cannot be written"),
        ("trace", ["--html", "page.png"], "The page cannot be written"),
    ],
)
def test_report_refuses_what_it_cannot_use(content, options, sentence, trace, capsys):
    if content is None:
        trace.unlink()
    elif content != "trace":
        trace.write_text(content)
    assert main(["report", str(trace), *options]) == 2
    assert sentence in capsys.readouterr().err
