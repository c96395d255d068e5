"""Objects that crash, exit or raise when they are pickled or loaded, after loky's own tests. Workers import this."""

import ctypes
import os

from tasks import Wrong

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
