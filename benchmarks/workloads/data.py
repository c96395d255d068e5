"""The data of several themes."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits, load_iris, make_classification


def iris() -> Any:
    """Return 150 rows of 4 features."""
    return load_iris(return_X_y=True)


def digits(n: int | None = None) -> Any:
    """Return at most ``n`` of 1,797 rows of 64 features."""
    data, labels = load_digits(return_X_y=True)
    return data[:n], labels[:n]


def blobs(n: int, n_features: int = 20) -> Any:
    """Return ``n`` rows of a problem of two classes."""
    return make_classification(n, n_features, n_informative=n_features // 2, random_state=0)


def noise_108mb() -> Any:
    """Return 450,000 rows of 30 features and labels that one of them predicts."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((450_000, 30))
    return data, (data[:, 0] + rng.standard_normal(len(data)) > 0).astype(int)


def frame() -> Any:
    """Return a pandas frame of 4,000 rows with text columns, and the labels."""
    import pandas as pd

    rng = np.random.default_rng(0)
    n = 4_000
    data = pd.DataFrame(rng.standard_normal((n, 6)), columns=[f"x{i}" for i in range(6)])
    data["city"] = rng.choice(["Bonn", "Lyon", "Oslo", "Rome"], n)
    data["plan"] = rng.choice(["basic", "plus"], n)
    return data, ((data["x0"] + (data["city"] == "Oslo")) > 0.2).to_numpy()
