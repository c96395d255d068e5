"""Cluster a dataset that is larger than the memory that each process may use.

The data is a file, opened as ``np.memmap``. Each task gets a slice of it, which travels as a file name and an
offset; the worker maps that part and lets go of it with the task. Each part is clustered by itself, then the
centres of all parts are clustered with their counts as weights. Only the line with ``parallel_backend`` is the
backend's.
"""

import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed, parallel_backend
from sklearn.cluster import KMeans, MiniBatchKMeans

import joblib_backends

LIMIT_MB = 400
N_ROWS, N_COLUMNS, N_CLUSTERS, PART_ROWS = 1_600_000, 100, 8, 40_000


def write_data(path):
    """Write 640 MB of points around known centres part by part, and return the centres."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(-10, 10, (N_CLUSTERS, N_COLUMNS)).astype(np.float32)
    with path.open("wb") as file:
        for _ in range(0, N_ROWS, PART_ROWS):
            points = rng.standard_normal((PART_ROWS, N_COLUMNS), dtype=np.float32)
            points += centres[rng.integers(N_CLUSTERS, size=PART_ROWS)]
            points.tofile(file)
    return centres


def peak_mb():
    """Return the most memory that this process has had so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts with that of the process which started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def cluster_part(part):
    """Return the centres of one part, how many points each has, and the worker's peak of memory."""
    model = MiniBatchKMeans(N_CLUSTERS, n_init=3, batch_size=4096, random_state=0).fit(part)
    counts = np.bincount(model.labels_, minlength=N_CLUSTERS)
    return model.cluster_centers_, counts, peak_mb()


def main():
    """Cluster the file, and compare with the centres around which it was written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "points.float32")
        centres = write_data(path)
        data = np.memmap(path, np.float32, "r", shape=(N_ROWS, N_COLUMNS))
        parts = (data[start : start + PART_ROWS] for start in range(0, N_ROWS, PART_ROWS))

        with parallel_backend("hybrid", tier="processes"):
            found, counts, peaks = zip(*Parallel(n_jobs=2)(delayed(cluster_part)(part) for part in parts), strict=True)

        model = KMeans(N_CLUSTERS, n_init=10, random_state=0)
        model.fit(np.concatenate(found), sample_weight=np.concatenate(counts))
        nbytes = data.nbytes

    distances = np.linalg.norm(centres[:, None] - model.cluster_centers_[None], axis=2).min(axis=1)
    print(f"{sum(map(np.sum, counts))} points in {N_CLUSTERS} clusters, centres within {distances.max():.3f}")
    print(f"data {nbytes / 1e6:.0f} MB, limit {LIMIT_MB} MB for each process")
    print(f"peaks: parent {peak_mb():.0f} MB, workers {max(peaks):.0f} MB")
    print(f"every process below the limit: {max(peak_mb(), *peaks) < LIMIT_MB}")
    print(joblib_backends.last_report())


if __name__ == "__main__":
    main()
