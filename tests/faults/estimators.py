"""Estimators whose fits are tasks. Workers import this, and scikit-learn, which their server has."""

from sklearn.base import BaseEstimator


class Candidate(BaseEstimator):
    """An estimator whose fit runs a task: its score is the task's result."""

    def __init__(self, task=None, index=0):
        self.task = task
        self.index = index

    def fit(self, X, y=None):  # noqa: N803
        fold = int(X[0, 0] == 0)  # the first fold trains on the second half, which is ones
        self.value_ = self.task(2 * self.index + fold, X[:0])
        return self

    def score(self, X, y=None):  # noqa: N803
        return self.value_
