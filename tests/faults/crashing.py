"""Objects that crash, exit or raise when they are pickled or loaded, after loky's own tests. Workers import this."""

import ctypes
import os

from joblib import delayed
from tasks import Wrong

from joblib_backends.errors import ResultPicklingError, TaskLoadError, TaskPicklingError, WorkerLostError

#: Where things go wrong, how, and the error of the call.
CRASHES = [
    ("pickle of an argument", "raise", TaskPicklingError),
    ("unpickle of an argument", "raise", TaskLoadError),
    ("unpickle of an argument", "exit", WorkerLostError),
    ("unpickle of an argument", "crash", WorkerLostError),
    ("the call", "raise", Wrong),
    ("the call", "exit", WorkerLostError),
    ("the call", "crash", WorkerLostError),
    ("pickle of the result", "raise", ResultPicklingError),
    ("pickle of the result", "exit", WorkerLostError),
    ("pickle of the result", "crash", WorkerLostError),
    ("unpickle of the result", "raise", ResultPicklingError),
]

ENDS = {
    "crash": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(3),
    "raise": lambda: _raise(),
}


def _raise():
    raise Wrong("mine")


def end(how):
    ENDS[how]()


class EndsAtPickle:
    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        end(self.how)


class EndsAtUnpickle:
    def __init__(self, how, pid=None):
        self.how, self.pid = how, pid

    def __reduce__(self):
        return _load, (self.how, self.pid)


def _load(how, pid):
    """Load the object, or end where it is loaded: everywhere, or in any process but ``pid``."""
    if pid != os.getpid():
        end(how)
    return EndsAtUnpickle(how, pid)


def returns(kind, how, pid):
    return kind(how) if kind is EndsAtPickle else kind(how, pid)


def takes(value):
    return 1


def ends(how):
    end(how)


def delayed_at(where, how):
    """Return a task that goes wrong there."""
    me = os.getpid()
    return {
        "pickle of an argument": lambda: delayed(takes)(EndsAtPickle(how)),
        "unpickle of an argument": lambda: delayed(takes)(EndsAtUnpickle(how)),
        "the call": lambda: delayed(ends)(how),
        "pickle of the result": lambda: delayed(returns)(EndsAtPickle, how, me),
        "unpickle of the result": lambda: delayed(returns)(EndsAtUnpickle, how, None),
    }[where]()
