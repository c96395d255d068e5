"""Tasks that run in the calling thread draw from streams of their own, and leave its global generators alone."""

import random
import threading

import numpy as np
import pytest
from conftest import LONG
from joblib import Parallel, delayed, parallel_backend

from joblib_backends.randomness import TaskRandomness, task_randomness


def draw(_):
    np.random.seed(3)
    random.seed(3)
    return np.random.randn(3).tolist(), random.random()


@pytest.mark.parametrize("n_tasks", [7, 300])
def test_tasks_that_seed_leave_the_generator_of_tasks_its_stream(n_tasks, monkeypatch):
    """What the user's generator draws must not depend on which tasks the calling thread ran."""
    monkeypatch.setattr("joblib_backends.relief._MUST_COMPLETE_S", 1e6)
    np.random.seed(0)
    random.seed(0)
    expected = [(np.random.randn(), random.random()) for _ in range(n_tasks)]
    after = np.random.rand(), random.random()
    np.random.seed(0)
    random.seed(0)
    drawn = []

    def tasks():
        for _ in range(n_tasks):
            drawn.append((np.random.randn(), random.random()))
            yield delayed(draw)(0)

    with parallel_backend("hybrid", n_jobs=2):
        results = Parallel()(tasks())
    assert drawn == expected
    assert (np.random.rand(), random.random()) == after
    assert results == [results[0]] * n_tasks


def test_tasks_that_do_not_seed_draw_different_numbers():
    with parallel_backend("hybrid", n_jobs=2):
        drawn = Parallel(batch_size=1)(delayed(np.random.rand)() for _ in range(50))
        drawn += Parallel(batch_size=1)(delayed(np.random.rand)() for _ in range(50))
    assert len(set(drawn)) == 100


def test_the_streams_are_apart_even_where_the_user_changed_the_generator():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        expected = np.random.RandomState(np.random.PCG64(1)).rand(2)
        first = np.random.rand()
        with task_randomness.separate():
            np.random.rand(5)
        assert [first, np.random.rand()] == list(expected)
    finally:
        np.random.set_bit_generator(before)


def test_a_normal_number_that_waits_stays_with_its_owner():
    np.random.seed(0)
    expected = np.random.RandomState(0).randn(4)
    drawn = []
    for _ in range(4):
        drawn.append(np.random.randn())
        with task_randomness.separate():
            np.random.randn()
    assert drawn == list(expected)


def test_the_calls_of_several_threads_leave_the_parents_stream_alone(monkeypatch):
    monkeypatch.setattr("joblib_backends.relief._MUST_COMPLETE_S", 1e6)

    def call():
        with parallel_backend("hybrid", n_jobs=2):
            for _ in range(20):
                Parallel()(delayed(draw)(0) for _ in range(10))

    np.random.seed(0)
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    assert np.random.rand() == np.random.RandomState(0).rand()


def test_the_generator_of_tasks_has_its_stream_while_a_task_runs_beside_it():
    np.random.seed(0)
    random.seed(0)
    expected = np.random.RandomState(0).rand(3).tolist(), [random.Random(0).random()]
    drawn = []
    with task_randomness.separate():
        np.random.rand(5)
        with task_randomness.outside():
            drawn += np.random.rand(2).tolist()
        np.random.seed(7)
        again = np.random.rand()
    assert ([*drawn, np.random.rand()], [random.random()]) == expected
    assert again == np.random.RandomState(7).rand()


def test_an_object_of_known_length_may_draw_while_it_yields(monkeypatch):
    """As a progress bar around a generator does."""
    monkeypatch.setattr("joblib_backends.relief._MUST_COMPLETE_S", 1e6)

    class Bar:
        def __len__(self):
            return 40

        def __iter__(self):
            return (delayed(draw_with)(np.random.rand()) for _ in range(40))

    np.random.seed(0)
    expected = np.random.rand(40).tolist()
    np.random.seed(0)
    with parallel_backend("hybrid", n_jobs=2):
        assert Parallel()(Bar()) == expected


def draw_with(value):
    np.random.seed(1)
    random.seed(1)
    return value


@pytest.mark.parametrize("at", ["enter", "leave"])
def test_ctrl_c_while_the_streams_change_leaves_the_parents_in_place(at, monkeypatch):
    np.random.seed(0)
    expected = np.random.RandomState(0).rand(2)
    streams = TaskRandomness()
    with streams.separate():
        pass
    first = np.random.rand()
    stream = streams._streams[-1]
    change = getattr(stream, at)

    def interrupted():
        monkeypatch.undo()
        change()
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, at, interrupted)
    with pytest.raises(KeyboardInterrupt), streams.separate():
        pass
    with streams.separate():
        np.random.rand()
    assert [first, np.random.rand()] == list(expected)
