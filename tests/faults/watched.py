"""Estimators that tell scikit-learn's callbacks what they do, and a callback. Workers import this."""

import os
import time
from pathlib import Path

import numpy as np
from clusters import start, started, wait_until
from joblib import Parallel, delayed, parallel_backend
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.callback import CallbackSupportMixin, with_callbacks
from sklearn.callback._callback_context import get_context_path
from sklearn.callback._transport import open_listener, send


class Iterating(CallbackSupportMixin, ClassifierMixin, BaseEstimator):
    """A classifier that is fitted in steps.

    At ``c == stays`` it stops after the first one until the file "go" is there; at ``c == fails`` it fails then, not
    before the other has stopped.
    """

    def __init__(self, c=0, n_steps=4, fails=None, stays=None, folder=None):
        self.c = c
        self.n_steps = n_steps
        self.fails = fails
        self.stays = stays
        self.folder = folder

    @with_callbacks
    def fit(self, X, y):  # noqa: N803
        watched = self._init_callback_context(max_subtasks=self.n_steps)
        watched.call_on_fit_task_begin(estimator=self, X=X, y=y)
        self.classes_ = np.unique(y)
        for step in range(self.n_steps):
            part = watched.subcontext(task_name="step").call_on_fit_task_begin(estimator=self, X=X, y=y)
            part.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes={"n_done_": step + 1})
            if step == 0:
                self._stop_here()
        self.n_done_ = self.n_steps
        watched.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes={})
        return self

    def _stop_here(self):
        if self.c == self.fails:
            wait_until(lambda: self.stays is None or started(self.folder))
            raise ValueError(f"a fit with c={self.c} fails")
        if self.c == self.stays:
            start(self.folder, f"c={self.c}")
            wait_until((Path(self.folder) / "go").exists)

    def predict(self, X):  # noqa: N803
        return (X[:, 0] * (self.c + 1) * self.n_done_ > 1.0).astype(int)


class Several(CallbackSupportMixin, ClassifierMixin, BaseEstimator):
    """Fits copies of an estimator at once, in a call of its own."""

    def __init__(self, estimator=None, n_copies=2, backend=("hybrid", {})):
        self.estimator = estimator
        self.n_copies = n_copies
        self.backend = backend

    @with_callbacks
    def fit(self, X, y):  # noqa: N803
        watched = self._init_callback_context(max_subtasks=self.n_copies, sequential_subtasks=False)
        watched.call_on_fit_task_begin(estimator=self, X=X, y=y)
        parts = [watched.subcontext(task_name="copy", task_id=i) for i in range(self.n_copies)]
        name, options = self.backend
        with parallel_backend(name, n_jobs=2, **options):
            found = Parallel()(delayed(_fit_one)(self, clone(self.estimator), X, y, part) for part in parts)
        self.estimators_ = [estimator for estimator, _ in found]
        self.pids_ = {pid for _, pid in found}
        self.classes_ = np.unique(y)
        watched.call_on_fit_task_end(estimator=self, X=X, y=y)
        return self

    def predict(self, X):  # noqa: N803
        return self.estimators_[0].predict(X)


def _fit_one(outer, estimator, X, y, part):  # noqa: N803
    with part.propagate_callback_context(estimator):
        part.call_on_fit_task_begin(estimator=outer, X=X, y=y)
        estimator.fit(X, y)
        part.call_on_fit_task_end(estimator=outer, X=X, y=y)
    return estimator, os.getpid()


class Minutes:
    """A callback that writes down what begins and what ends, in the order in which it is told."""

    max_propagation_depth = None

    def __init__(self):
        self.lines = []
        self._listener_handle = open_listener(self.lines.append, owner=self)

    def __getstate__(self):
        return {**self.__dict__, "lines": []}

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        self._write("begin", context)

    def on_fit_task_end(self, estimator, context):
        self._write("end", context)

    def _write(self, what, context):
        path = tuple(part.task_id for part in get_context_path(context))
        send(self._listener_handle, (what, path, context.estimator_name))


def handle_of(callback):
    """Return what a worker knows of the listener of a callback: its address and its key."""
    return tuple(callback._listener_handle)


def with_its_handle(callback):
    """Return the very handle that a worker has."""
    return callback._listener_handle


def fit_inside(model, X, y):  # noqa: N803
    """Return the processes in which an estimator has fitted its copies, and its own."""
    return model.fit(X, y).pids_, os.getpid()


def say(callback, n_messages, n_bytes=0):
    """Say much at once, and how long each took to be taken."""
    begun = time.monotonic()
    for i in range(n_messages):
        send(callback._listener_handle, (i, bytes(n_bytes)))
    return time.monotonic() - begun
