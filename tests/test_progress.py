"""The bar of a call: what it says, where it is drawn, and where not."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
import threading

import pytest
from conftest import LONG, REAL_TIERS, eventually, make_hybrid
from joblib import Parallel, delayed
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.tree import DecisionTreeClassifier

from joblib_backends.errors import ConfigurationError

X, Y = load_iris(return_X_y=True)


@pytest.fixture(params=REAL_TIERS)
def tier(request):
    return request.param


@pytest.fixture
def hybrid_on(tier, request):
    """Return the factory of contexts on each tier."""
    return make_hybrid(tier, request)


@pytest.fixture
def hybrid(request):
    return make_hybrid("threads", request)


def square(i):
    return i * i


def last_line(text):
    """Return what is left to see of a bar that was drawn again and again."""
    return re.split(r"[\r\n]+", text.strip())[-1]


def test_a_search_shows_what_it_is_how_many_fits_it_has_and_where_they_run(hybrid_on, tier, capfd):
    with hybrid_on(progress="always"):
        GridSearchCV(DecisionTreeClassifier(), {"max_depth": [1, 2, 3, 4]}, cv=3, n_jobs=2).fit(X, Y)
    line = last_line(capfd.readouterr().err)
    assert re.match(r"GridSearchCV: 100%\|.*\| 12/12 fits \[.*\]$", line)
    assert tier in line


def test_the_number_of_fits_is_known_from_the_first_on(hybrid, capfd):
    with hybrid(progress="always"):
        GridSearchCV(DecisionTreeClassifier(), {"max_depth": [1, 2, 3, 4]}, cv=3, n_jobs=2).fit(X, Y)
    assert "GridSearchCV:   0%|" in capfd.readouterr().err


def test_what_has_a_length_shows_it_and_a_generator_when_it_has_ended(hybrid, capfd):
    with hybrid(progress="always"):
        Parallel(batch_size=1)([delayed(square)(i) for i in range(9)])
        assert re.match(r"square: 100%\|.*\| 9/9 tasks", last_line(capfd.readouterr().err))
        Parallel(batch_size=1)(delayed(square)(i) for i in range(9))
        text = capfd.readouterr().err
    assert "square: 0tasks" in text
    assert re.match(r"square: 100%\|.*\| 9/9 tasks", last_line(text))


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_generators_of_results(hybrid_on, capfd, return_as):
    with hybrid_on(progress="always"):
        results = Parallel(batch_size=1, return_as=return_as)(delayed(square)(i) for i in range(9))
        assert sorted(results) == [i * i for i in range(9)]
    assert "9/9 tasks" in last_line(capfd.readouterr().err)


def test_a_cross_validation_is_called_by_its_estimator(hybrid, capfd):
    with hybrid(progress="always"):
        cross_validate(DecisionTreeClassifier(), X, Y, cv=4, n_jobs=2)
    assert re.match(r"DecisionTreeClassifier: 100%\|.*\| 4/4 fits", last_line(capfd.readouterr().err))


def squares(n):
    return Parallel(n_jobs=2)(delayed(square)(i) for i in range(n))


def test_calls_in_tasks_draw_nothing(hybrid_on, capfd):
    with hybrid_on(progress="always"):
        Parallel(batch_size=1)(delayed(squares)(5) for _ in range(4))
    text = capfd.readouterr().err
    assert "4/4 tasks" in last_line(text)
    assert "square:" not in text


def test_calls_that_print_lines_have_no_bar(hybrid, capfd):
    with hybrid(progress="always"):
        Parallel(batch_size=1, verbose=10)(delayed(square)(i) for i in range(4))
    text = "".join(capfd.readouterr())
    assert "%|" not in text
    assert "[Parallel(n_jobs=2)]: Done   4 out of   4" in text


def fail_at(i, bad):
    if i == bad:
        raise LookupError(i)
    return i


def test_a_call_that_fails_leaves_its_bar_as_it_is_and_the_next_one_has_its_own(hybrid, capfd):
    with hybrid(progress="always"):
        with pytest.raises(LookupError):
            Parallel(batch_size=1)([delayed(fail_at)(i, 3) for i in range(8)])
        assert re.search(r"fail_at: +\d+%\|.*/8 tasks", last_line(capfd.readouterr().err))
        Parallel(batch_size=1)([delayed(square)(i) for i in range(3)])
    assert "square: 100%" in last_line(capfd.readouterr().err)


def test_two_calls_at_once_have_a_bar_each(hybrid, capfd):
    met = threading.Barrier(2, timeout=LONG)

    def call(function):
        with hybrid(progress="always"):
            met.wait()
            Parallel(batch_size=1)([delayed(function)(i) for i in range(5)])

    threads = [threading.Thread(target=call, args=(function,)) for function in (square, abs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    text = capfd.readouterr().err
    assert all(re.search(rf"{name}: 100%\|.*5/5 tasks", text) for name in ("square", "abs"))


def test_fits_that_were_shared_and_tasks_from_a_checkpoint_count(capfd, tmp_path):
    from joblib import parallel_backend
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline

    with parallel_backend("hybrid", n_jobs=2, tier="processes", progress="always", checkpoint=tmp_path / "kept"):
        for _ in range(2):
            pipeline = make_pipeline(PCA(random_state=0), DecisionTreeClassifier(random_state=0))
            grid = {"decisiontreeclassifier__max_depth": [1, 2, 3, 4]}
            GridSearchCV(pipeline, grid, cv=3, refit=False, n_jobs=2).fit(X, Y)
            line = last_line(capfd.readouterr().err)
            assert "12/12 fits" in line


# ---- where


def script(progress):
    return textwrap.dedent(f"""
        import joblib, joblib_backends
        with joblib.parallel_backend("hybrid", n_jobs=2, tier="threads", progress={progress!r}):
            joblib.Parallel()([joblib.delayed(abs)(-i) for i in range(5)])
    """)


def test_true_is_silent_where_nobody_looks():
    done = subprocess.run([sys.executable, "-c", script(True)], capture_output=True, text=True, timeout=LONG)
    assert (done.returncode, done.stderr) == (0, "")


def test_true_draws_on_a_terminal():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    try:
        process = subprocess.Popen([sys.executable, "-c", script(True)], stderr=theirs)
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(ours, 4096):
                text += part
        assert process.wait(LONG) == 0
    finally:
        os.close(ours)
    assert "abs: 100%" in text.decode()


def test_without_standard_error_nothing_is_drawn():
    code = "import sys; sys.stderr = None\n" + script(True)
    assert subprocess.run([sys.executable, "-c", code], timeout=LONG).returncode == 0


def test_by_the_environment(monkeypatch, capfd):
    from joblib import parallel_backend

    monkeypatch.setenv("JOBLIB_BACKEND_PROGRESS", "always")
    with parallel_backend("hybrid", n_jobs=2, tier="threads"):
        Parallel()([delayed(square)(i) for i in range(5)])
    assert "5/5 tasks" in last_line(capfd.readouterr().err)


def test_what_cannot_be_meant():
    from joblib import parallel_backend

    with pytest.raises(ConfigurationError, match="progress is 3"), parallel_backend("hybrid", progress=3):
        pass


def test_no_thread_of_tqdm_is_left(capfd):
    from joblib import parallel_backend

    with parallel_backend("hybrid", n_jobs=2, tier="threads", progress="always"):
        Parallel()([delayed(square)(i) for i in range(5)])
    assert eventually(lambda: not [one for one in threading.enumerate() if "tqdm" in type(one).__module__])
