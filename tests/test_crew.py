"""Threads that stay between calls."""

import gc
import os
import threading

import pytest
from conftest import LONG, eventually, own_threads

from joblib_backends.crew import Crew


def run_and_wait(crew):
    """Run a body and return the thread that ran it, when it is idle again."""
    n_idle, found, done = len(crew._roster.idle), [], threading.Event()
    crew.run(lambda: (found.append(threading.current_thread()), done.set()))
    assert done.wait(LONG)
    assert eventually(lambda: len(crew._roster.idle) >= max(1, n_idle))
    return found[0]


def test_a_thread_that_is_idle_is_used_again():
    crew = Crew()
    assert run_and_wait(crew) is run_and_wait(crew)


def test_work_never_waits_for_a_thread():
    """Each body waits for all others to have started."""
    crew, together = Crew(), threading.Barrier(8, timeout=LONG)
    met = [threading.Event() for _ in range(7)]
    for event in met:
        crew.run(lambda event=event: (together.wait(), event.set()))
    together.wait()
    assert all(event.wait(LONG) for event in met)


def test_a_body_may_run_another_one():
    crew, done = Crew(), threading.Event()
    crew.run(lambda: crew.run(done.set))
    assert done.wait(LONG)


def test_the_threads_end_with_their_crew(leaves_nothing):
    crew = Crew()
    thread = run_and_wait(crew)
    del crew
    gc.collect()
    thread.join(LONG)
    assert not thread.is_alive()


def test_a_thread_that_is_busy_when_the_crew_ends_ends_after_its_body():
    crew, started, go = Crew(), threading.Event(), threading.Event()
    before = own_threads()
    crew.run(lambda: (started.set(), go.wait(LONG)))
    assert started.wait(LONG)
    (thread,) = own_threads() - before
    del crew
    gc.collect()
    assert thread.is_alive()
    go.set()
    thread.join(LONG)
    assert not thread.is_alive()


def test_all_who_ask_at_once_share_one_crew():
    first = Crew.shared()
    assert Crew.shared() is first
    del first
    gc.collect()


def test_the_threads_are_daemons():
    assert run_and_wait(Crew()).daemon


def test_a_body_lets_go_of_what_it_held():
    class Held:
        pass

    crew, held, gone = Crew(), Held(), threading.Event()
    finalizer = __import__("weakref").finalize(held, gone.set)
    crew.run(lambda held=held: None)
    del held
    assert eventually(gone.is_set)
    assert not finalizer.alive


def test_a_crew_says_how_many_are_idle():
    crew = Crew()
    run_and_wait(crew)
    assert repr(crew) == "<Crew 1 idle threads>"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_a_crew_of_its_own():
    crew = Crew.shared()
    run_and_wait(crew)
    child = os.fork()
    if child == 0:
        done = threading.Event()
        Crew.shared().run(done.set)
        os._exit(0 if Crew.shared() is not crew and done.wait(10) else 1)
    assert os.waitpid(child, 0)[1] == 0
