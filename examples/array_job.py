"""The same job over one array on threads, on processes and on a Dask cluster, with equal results.

Only the lines with ``parallel_backend`` are the backend's. The array is larger than 1 MB, so it is placed once where
workers read it, and each task carries no more than where its part begins.
"""

import numpy as np
from joblib import Parallel, delayed, parallel_backend

import joblib_backends


def strongest_frequency(signals, row):
    """Return the frequency with the most power in one row, and that power."""
    power = np.abs(np.fft.rfft(signals[row])) ** 2
    power[0] = 0.0
    return int(power.argmax()), float(power.max())


def make_signals(n_rows=64, n_samples=100_000):
    """Return noise with one wave in each row: row r has the frequency 10 * (r + 1)."""
    time = np.arange(n_samples) / n_samples
    signals = np.random.default_rng(0).standard_normal((n_rows, n_samples))
    for row in range(n_rows):
        signals[row] += np.sin(2 * np.pi * 10 * (row + 1) * time)
    return signals


def job(signals):
    """Run the tasks of the job, wherever the active backend runs them."""
    return Parallel(n_jobs=2)(delayed(strongest_frequency)(signals, row) for row in range(len(signals)))


def main():
    """Run the job in a plain loop and in three places, and compare."""
    from distributed import Client, LocalCluster

    signals = make_signals()
    alone = [strongest_frequency(signals, row) for row in range(len(signals))]
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        places = {"threads": {"tier": "threads"}, "processes": {"tier": "processes"}, "dask": {"client": client}}
        for place, options in places.items():
            with parallel_backend("hybrid", **options):
                found = job(signals)
            print(f"{place}: {len(found)} rows, equal to the plain loop: {found == alone}")
            print(joblib_backends.last_report())


if __name__ == "__main__":
    main()
