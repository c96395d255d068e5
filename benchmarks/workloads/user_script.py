"""A user's script: its function lives in ``__main__``, which no worker can import (see ``arrays.py``)."""

import numpy as np


def simulate(seed: int, n_paths: int = 500, n_steps: int = 400) -> float:
    """Return the price of an option on the mean of a random walk, path by path."""
    rng = np.random.default_rng(seed)
    payoffs = []
    for _ in range(n_paths):
        path = np.exp(np.cumsum(rng.standard_normal(n_steps)) * 0.01)
        payoffs.append(max(path.mean() - 1.0, 0.0))
    return float(np.mean(payoffs))
