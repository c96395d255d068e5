"""JOBLIB_BACKEND selects the default backend of a process, however the process starts, and breaks none.

Each test starts an interpreter of its own, because what is tested happens at its start and once.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from joblib_backends.activation import _Factory
from joblib_backends.config import Activation

ROOT = Path(__file__).resolve().parent.parent
LONG = 60
LINE = "joblib_backends: JOBLIB_BACKEND=hybrid from the environment is the default backend of this process"

#: Says where a call ran: nothing in it names us, and it runs as a module, too.
SCRIPT = """
from joblib import Parallel, delayed
import sys

def call(**options):
    # Of a list the calling thread would run such small tasks itself.
    list(Parallel(return_as="generator", **options)(delayed(abs)(-i) for i in range(4)))
    report = sys.modules["joblib_backends"].last_report()
    return f"{report.tier} with {report.n_jobs} jobs"

if __name__ == "__main__":
    print(call(n_jobs=2))
"""


def python(*arguments, cwd, code=None, **variables):
    """Run an interpreter in ``cwd`` with the ``JOBLIB_BACKEND`` variables given and no others."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JOBLIB")}
    environment["JOBLIB_BACKEND_PROFILE"] = "off"
    environment |= {name: text for name, text in variables.items() if text is not None}
    command = [sys.executable, *arguments, *(("-c", textwrap.dedent(code)) if code else ())]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=LONG, stdin=subprocess.DEVNULL
    )


def output(*arguments, cwd, JOBLIB_BACKEND="hybrid", JOBLIB_BACKEND_QUIET="1", **options):  # noqa: N803
    """Return what an interpreter printed that must end well and say nothing on stderr."""
    done = python(
        *arguments, cwd=cwd, JOBLIB_BACKEND=JOBLIB_BACKEND, JOBLIB_BACKEND_QUIET=JOBLIB_BACKEND_QUIET, **options
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


# ---- however a process starts


@pytest.mark.parametrize(
    "arguments",
    [("script.py",), ("-m", "script"), ("-I", "script.py"), ("-c", SCRIPT)],
    ids=["script", "module", "isolated", "command"],
)
def test_an_unmodified_program_runs_on_it(folder, arguments):
    assert output(*arguments, cwd=folder, JOBLIB_BACKEND_TIER="threads") == "threads with 2 jobs"


def test_a_console_script_runs_on_it(folder):
    command = folder / "command"
    command.write_text(f"#!{sys.executable}\nfrom script import call\nprint(call(n_jobs=2))")
    assert output(str(command), cwd=folder, JOBLIB_BACKEND_TIER="threads") == "threads with 2 jobs"


def test_a_test_run_by_pytest_runs_on_it(folder):
    (folder / "test_call.py").write_text(
        "from script import call\ndef test_it():\n    assert call(n_jobs=2) == 'threads with 2 jobs'\n"
    )
    done = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_call.py"),
        cwd=folder,
        JOBLIB_BACKEND="hybrid",
        JOBLIB_BACKEND_TIER="threads",
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import joblib",
        "import joblib.parallel",
        "import joblib_backends",
        "from sklearn.svm import SVC",
        "import importlib.util; assert importlib.util.find_spec('joblib')",
        "import importlib, joblib; importlib.reload(joblib)",
    ],
)
def test_whatever_is_imported_first(folder, first):
    code = f"{first}\nfrom script import call\nprint(call(n_jobs=2))"
    assert output(cwd=folder, code=code, JOBLIB_BACKEND_TIER="threads") == "threads with 2 jobs"


CHILDREN = """
import multiprocessing, sys
from joblib import Parallel, delayed, parallel

def default(_=None):
    return type(parallel.get_active_backend()[0]).__name__

if __name__ == "__main__":
    print(default())
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print(*pool.map(default, range(2)))
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_children_have_it_and_are_silent(tmp_path, method):
    (tmp_path / "children.py").write_text(CHILDREN)
    done = python("-W", "ignore", "children.py", method, cwd=tmp_path, JOBLIB_BACKEND="hybrid")
    assert done.stdout.split() == ["HybridBackend"] * 3, done.stderr
    assert done.stderr.count(LINE) == len(done.stderr.splitlines()) == 1


def test_workers_have_it_and_are_silent(tmp_path):
    code = """
    from joblib import Parallel, delayed, parallel
    import threading
    def default():
        found = []
        thread = threading.Thread(target=lambda: found.append(type(parallel.get_active_backend()[0]).__name__))
        thread.start()
        thread.join()
        return found[0]
    print(*Parallel(n_jobs=2)(delayed(default)() for _ in range(2)))
    """
    done = python(cwd=tmp_path, code=code, JOBLIB_BACKEND="hybrid", JOBLIB_BACKEND_TIER="processes")
    assert done.stdout.split() == ["HybridBackend"] * 2, done.stderr
    assert done.stderr.count(LINE) == len(done.stderr.splitlines()) == 1


# ---- what it selects


def test_hints_and_constraints_reach_it_with_the_number_of_jobs(folder):
    code = """
    from script import call
    print(call(n_jobs=2, prefer="threads"), call(n_jobs=2, require="sharedmem"), sep="\\n")
    from joblib import parallel, parallel_config
    with parallel_config(n_jobs=3):
        print(call(require="sharedmem"), call(prefer="threads"), sep="\\n")
    print({parallel.DEFAULT_BACKEND, parallel.DEFAULT_THREAD_BACKEND, parallel.DEFAULT_PROCESS_BACKEND})
    """
    two, three = ["threads with 2 jobs"] * 2, ["threads with 3 jobs"] * 2
    assert output(cwd=folder, code=code).splitlines() == [*two, *three, "{'from-environment'}"]


def test_a_preference_for_processes_reaches_it(folder):
    code = "from script import call\nprint(call(n_jobs=2, prefer='processes'))"
    assert output(cwd=folder, code=code) == "processes with 2 jobs"


def test_a_forest_fits_and_predicts_on_it(tmp_path):
    code = """
    import sys
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    X, y = load_iris(return_X_y=True)
    forest = RandomForestClassifier(8, n_jobs=2, random_state=0)
    for method in (forest.fit, lambda X, y: forest.predict(X)):
        method(X, y)
        report = sys.modules["joblib_backends"].last_report()
        print(report.function.rpartition(".")[2], report.tier, report.n_jobs)
    """
    lines = output(cwd=tmp_path, code=code).splitlines()
    # Which tier the planner took is its own affair, once it has seen some trees.
    assert [line.split()[0] for line in lines] == ["_parallel_build_trees", "_accumulate_prediction"]
    assert {line.split()[-1] for line in lines} == {"2"}


@pytest.mark.parametrize(("n_jobs", "expected"), [(None, "1 1"), ("2", "2 2"), ("3", "3 3")])
def test_n_jobs_left_out_means_one_unless_the_environment_says_more(tmp_path, n_jobs, expected):
    code = "import joblib\nprint(joblib.Parallel(n_jobs=None).n_jobs, joblib.effective_n_jobs(None))"
    assert output(cwd=tmp_path, code=code, JOBLIB_BACKEND_N_JOBS=n_jobs) == expected


BACKENDS = """
from joblib import Parallel, delayed, parallel_config
def backend(**options):
    parallel = Parallel(n_jobs=2, **options)
    assert parallel(delayed(abs)(-i) for i in range(4)) == [0, 1, 2, 3]
    return type(parallel._backend).__name__
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # joblib's own backends do as in parallel_config(backend=name): a preference does not move them.
        ("threading", ["ThreadingBackend", "ThreadingBackend", "ThreadingBackend"]),
        ("loky", ["LokyBackend", "LokyBackend", "ThreadingBackend"]),
        ("sequential", ["SequentialBackend"] * 3),
    ],
)
def test_it_may_be_a_backend_of_joblib(tmp_path, name, expected):
    code = BACKENDS + (
        f"print(backend(), backend(prefer={'processes' if name == 'threading' else 'threads'!r}),"
        " backend(require='sharedmem'))"
    )
    assert output(cwd=tmp_path, code=code, JOBLIB_BACKEND=name).split() == expected


def test_it_may_be_joblibs_dask_backend(tmp_path):
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    code = BACKENDS + (
        "from distributed import Client\n"
        "with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None):\n"
        "    print(backend())"
    )
    # distributed warns when its port for HTTP is taken.
    assert output("-W", "ignore", cwd=tmp_path, code=code, JOBLIB_BACKEND="dask") == "DaskDistributedBackend"


def test_it_may_be_a_backend_that_the_program_registers(tmp_path):
    code = BACKENDS + (
        "import joblib\n"
        "class Own(joblib._parallel_backends.ThreadingBackend): pass\n"
        "joblib.register_parallel_backend('own', Own)\n"
        "print(backend())"
    )
    assert output(cwd=tmp_path, code=code, JOBLIB_BACKEND="own") == "Own"


def test_a_backend_named_in_the_code_wins(tmp_path):
    code = BACKENDS + (
        "print(backend(backend='threading'))\n"
        "with parallel_config(backend='threading'):\n    print(backend())\n"
        "import joblib\n"
        "joblib.register_parallel_backend('mine', joblib._parallel_backends.ThreadingBackend, make_default=True)\n"
        "print(backend())"
    )
    assert output(cwd=tmp_path, code=code).split() == ["ThreadingBackend"] * 3


# ---- what it says


def test_the_first_call_prints_one_line(folder):
    code = "from script import call\nfor _ in range(3): call(n_jobs=2)"
    done = python(cwd=folder, code=code, JOBLIB_BACKEND="hybrid", JOBLIB_BACKEND_TIER="threads")
    assert done.stderr.splitlines() == [f"{LINE} (JOBLIB_BACKEND_QUIET=1 hides this line)."]


def test_threads_that_come_first_together_print_one_line(folder):
    code = """
    from script import call
    import threading
    together = threading.Barrier(4)
    def body():
        together.wait()
        call(n_jobs=2)
    threads = [threading.Thread(target=body) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    """
    done = python(cwd=folder, code=code, JOBLIB_BACKEND="hybrid", JOBLIB_BACKEND_TIER="threads")
    assert done.stderr.count("\n") == done.stderr.count(LINE) == 1, done.stderr


def test_the_environment_stays_as_it_was(folder):
    code = """
    import os
    before = dict(os.environ)
    from script import call
    call(n_jobs=2)
    print({name for name in {*before, *os.environ} if name.startswith("JOBLIB") and before != os.environ})
    """
    assert output(cwd=folder, code=code, JOBLIB_BACKEND_TIER="threads") == "set()"


@pytest.mark.parametrize("stream", ["None", "open(sys.__stderr__.fileno(), 'w', closefd=False); sys.stderr.close()"])
def test_a_process_without_stderr_runs(folder, stream):
    code = f"import sys\nfrom script import call\nsys.stderr = {stream}\nprint(call(n_jobs=2))"
    printed = output(cwd=folder, code=code, JOBLIB_BACKEND_TIER="threads", JOBLIB_BACKEND_QUIET=None)
    assert printed == "threads with 2 jobs"


WRONG = {
    "backend": (
        {"JOBLIB_BACKEND": "hybird"},
        "JOBLIB_BACKEND is 'hybird', but must be one of 'dask', 'hybrid', 'loky'",
    ),
    "its own name": ({"JOBLIB_BACKEND": "from-environment"}, "'from-environment', but must be one of"),
    "no client": ({"JOBLIB_BACKEND": "dask"}, "JOBLIB_BACKEND is 'dask', but that backend cannot be made here"),
    "n_jobs": ({"JOBLIB_BACKEND_N_JOBS": "many"}, "JOBLIB_BACKEND_N_JOBS is 'many', but must be a whole number"),
    "zero": ({"JOBLIB_BACKEND_N_JOBS": "0"}, "JOBLIB_BACKEND_N_JOBS is '0', but must be a whole number other than 0"),
    "tier": ({"JOBLIB_BACKEND_TIER": "gpu"}, "JOBLIB_BACKEND_TIER is 'gpu', but must be one of 'auto', 'dask'"),
    "threads": ({"JOBLIB_BACKEND_INNER_MAX_NUM_THREADS": "0"}, "JOBLIB_BACKEND_INNER_MAX_NUM_THREADS='0' cannot"),
    "seconds": (
        {"JOBLIB_BACKEND_WAIT_FOR_WORKERS": "soon"},
        "JOBLIB_BACKEND_WAIT_FOR_WORKERS is 'soon', but must be a",
    ),
    "unknown": ({"JOBLIB_BACKEND_NJOBS": "2"}, "environment variable is 'JOBLIB_BACKEND_NJOBS', but must be one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_one_sentence_at_the_first_call_and_at_every_other(tmp_path, case):
    variables, sentence = WRONG[case]
    code = """
    import joblib
    for _ in range(2):
        try:
            joblib.Parallel(n_jobs=2)
        except ValueError as error:
            print(error)
    """
    first, again = output(cwd=tmp_path, code=code, **variables).splitlines()
    assert sentence in first
    assert again == first
    assert first.endswith(".")


# ---- what it costs and cannot break


def test_a_program_without_joblib_imports_nothing_for_it(tmp_path):
    def imported(value):
        done = python("-X", "importtime", "-c", "pass", cwd=tmp_path, JOBLIB_BACKEND=value)
        return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}

    assert imported("hybrid") - imported(None) == {"_joblib_backends_hook"}


def test_a_program_that_only_imports_joblib_does_not_load_the_package(tmp_path):
    code = "import joblib, sys\nprint('joblib_backends' in sys.modules, joblib.__loader__, joblib.__spec__.loader)"
    found = output(cwd=tmp_path, code=code).split(maxsplit=1)
    assert found[0] == "False"
    assert "_Loader" not in found[1]


def test_nothing_happens_without_the_variable(tmp_path):
    code = "import joblib, sys\nprint(joblib.parallel.DEFAULT_BACKEND, '_joblib_backends_hook' in sys.modules)"
    assert output(cwd=tmp_path, code=code, JOBLIB_BACKEND=None) == "loky False"
    assert output(cwd=tmp_path, code=BACKENDS + "print(backend())", JOBLIB_BACKEND=" ") == "LokyBackend"


def test_joblib_may_be_missing(tmp_path):
    code = """
    import sys
    sys.path = [entry for entry in sys.path if "site-packages" not in entry]
    try:
        import joblib
    except ModuleNotFoundError as error:
        print(error)
    """
    assert output(cwd=tmp_path, code=code) == "No module named 'joblib'"


def test_a_users_own_joblib_is_left_alone(tmp_path):
    (tmp_path / "joblib.py").write_text("MINE = True")
    assert output(cwd=tmp_path, code="import joblib; print(joblib.MINE)") == "True"


def test_a_variable_that_the_program_removes_selects_nothing(tmp_path):
    code = "import os, joblib\ndel os.environ['JOBLIB_BACKEND']\n" + BACKENDS + "print(backend())"
    assert output(cwd=tmp_path, code=code) == "LokyBackend"


HOOK = f"import sys; sys.path[:0] = [{str(ROOT / 'pth')!r}]; import _joblib_backends_hook as hook\n"
FAKE_PARALLEL = "class Loky:\n    def __init__(self, nesting_level): pass\n" + (
    "BACKENDS = {'loky': Loky}\nDEFAULT_BACKEND = DEFAULT_PROCESS_BACKEND = 'loky'\n"
)


@pytest.fixture
def fake_joblib(tmp_path):
    """Return a folder with a package called joblib, for what the hook does without ours: no ``site`` is read."""
    package = tmp_path / "joblib"
    package.mkdir()
    (package / "__init__.py").write_text("from . import parallel")
    (package / "parallel.py").write_text(FAKE_PARALLEL)
    return tmp_path


def test_a_package_that_is_gone_leaves_joblibs_defaults(fake_joblib):
    code = HOOK + (
        "hook.install(); import joblib; made = joblib.parallel.BACKENDS[joblib.parallel.DEFAULT_BACKEND](0)\n"
        "print(type(made).__name__, joblib.parallel.DEFAULT_BACKEND, joblib.parallel.DEFAULT_PROCESS_BACKEND)"
    )
    assert output("-S", cwd=fake_joblib, code=code) == "Loky loky loky"


def test_joblib_may_be_there_before_the_hook(fake_joblib):
    code = HOOK + "import joblib; hook.install(); print(joblib.parallel.DEFAULT_BACKEND, len(sys.meta_path))"
    assert output("-S", cwd=fake_joblib, code=code) == "from-environment 3"


def test_an_import_that_failed_may_be_tried_again(fake_joblib):
    (fake_joblib / "joblib" / "__init__.py").write_text(
        "import sys\nif not hasattr(sys, 'once'):\n    sys.once = True\n    raise ImportError('not yet')\n"
        "from . import parallel"
    )
    code = HOOK + (
        "hook.install()\n"
        "try:\n    import joblib\nexcept ImportError as error:\n    print(error)\n"
        "import joblib\nprint(joblib.parallel.DEFAULT_BACKEND, len(sys.meta_path))"
    )
    assert output("-S", cwd=fake_joblib, code=code).splitlines() == ["not yet", "from-environment 3"]


def test_another_hook_that_asks_all_finders_does_not_recurse(fake_joblib):
    code = HOOK + (
        "import importlib.util\n"
        "class Other:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        for finder in sys.meta_path:\n"
        "            if finder is not self and name == 'joblib' and (spec := finder.find_spec(name, path, target)):\n"
        "                return spec\n"
        "hook.install(); hook.install(); sys.meta_path.insert(0, Other())\n"
        "import joblib\nprint(joblib.parallel.DEFAULT_BACKEND, len(sys.meta_path))"
    )
    assert output("-S", cwd=fake_joblib, code=code) == "from-environment 4"


def test_a_lazy_loader_may_wrap_the_hooks(fake_joblib):
    code = HOOK + (
        "import copy, importlib.util as util\n"
        "hook.install(); spec = util.find_spec('joblib'); copy.copy(spec.loader)\n"
        "spec.loader = util.LazyLoader(spec.loader); sys.modules['joblib'] = joblib = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(joblib)\n"
        "print('joblib.parallel' in sys.modules, joblib.parallel.DEFAULT_BACKEND)"
    )
    assert output("-S", cwd=fake_joblib, code=code) == "False from-environment"


def test_joblib_may_be_in_an_archive(fake_joblib):
    code = HOOK + (
        "import shutil; shutil.make_archive('library', 'zip', '.', 'joblib'); shutil.rmtree('joblib')\n"
        "sys.path[:] = ['library.zip', *sys.path]; hook.install()\n"
        "import joblib; print(joblib.parallel.DEFAULT_BACKEND, type(joblib.__loader__).__name__)"
    )
    assert output("-S", cwd=fake_joblib, code=code) == "from-environment zipimporter"


def test_the_line_of_the_pth_file_is_silent_without_the_hook(tmp_path):
    line = (ROOT / "pth" / "joblib_backends.pth").read_text()
    assert output("-S", cwd=tmp_path, code=f"{line}\nprint('started')") == "started"


def test_the_factory_says_what_it_makes():
    assert repr(_Factory(Activation("hybrid", None, True))) == "<_Factory of 'hybrid' from the environment>"
