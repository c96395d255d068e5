"""Warnings are noted for the thread that gives them, shown all the same, and the user's own hook stays in place."""

import threading
import warnings

import pytest

from joblib_backends.sharing.warned import noting, show_again


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """Return what a hook of the user's was shown."""
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: lines.append(str(message)))
        yield lines


def warn(text):
    warnings.warn(text, UserWarning, stacklevel=1)


def test_what_is_noted_is_shown_now_and_again(shown):
    hook = warnings.showwarning
    with noting() as noted:
        warn("first")
    warn("later")
    assert [str(one.message) for one in noted] == ["first"]
    assert (noted[0].category, noted[0].filename) == (UserWarning, __file__)
    assert shown == ["first", "later"]
    assert warnings.showwarning is hook
    show_again(noted)
    assert shown == ["first", "later", "first"]


def test_an_outer_computation_notes_what_an_inner_one_does(shown):
    with noting() as outer:
        warn("before")
        with noting() as inner:
            warn("inside")
        warn("after")
    assert [str(one.message) for one in inner] == ["inside"]
    assert [str(one.message) for one in outer] == ["before", "inside", "after"]
    assert shown == ["before", "inside", "after"]


def test_each_thread_notes_its_own(shown):
    started, ended, noted_there = threading.Event(), threading.Event(), []

    def other():
        with noting() as noted:
            warn("there")
            started.set()
            ended.wait(10)
        noted_there.extend(noted)

    thread = threading.Thread(target=other)
    with noting() as noted:
        thread.start()
        assert started.wait(10)
        warn("here")
    ended.set()
    thread.join(10)
    warn("later")
    assert [str(one.message) for one in noted] == ["here"]
    assert [str(one.message) for one in noted_there] == ["there"]
    assert shown == ["there", "here", "later"]


def test_who_puts_our_hook_back_later_still_shows_through_the_users(shown):
    with noting():
        ours = warnings.showwarning
    warnings.showwarning = ours
    warn("late")
    assert shown == ["late"]


def test_an_error_ends_the_noting(shown):
    hook = warnings.showwarning
    with pytest.raises(ValueError, match="x"), noting():
        raise ValueError("x")
    assert warnings.showwarning is hook
