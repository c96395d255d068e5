"""Clusters for the tests of this folder."""

import contextlib

import pytest


@pytest.fixture(scope="module")
def nursery():
    """Return the process whose children are schedulers and workers."""
    from clusters import Nursery

    with contextlib.closing(Nursery()) as nursery:
        yield nursery


@pytest.fixture
def make_cluster(nursery, tmp_path):
    """Return a function that starts a cluster; all of them are ended after the test."""
    from clusters import Cluster

    with contextlib.ExitStack() as stack:

        def make(n_workers=2, **options):
            cluster = Cluster(nursery, tmp_path, n_workers, **options)
            stack.callback(cluster.close)
            return cluster.ready() if n_workers else cluster

        yield make
