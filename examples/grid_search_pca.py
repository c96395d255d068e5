"""A grid search over PCA and logistic regression: 10,000 rows of 500 columns, 18 combinations, 3 folds.

Only the line with ``parallel_backend`` is the backend's. ``--small`` takes a tenth of the rows and columns.
"""

import sys

from joblib import parallel_backend
from sklearn.datasets import make_classification
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import joblib_backends


def main(small):
    """Search, and print what was found and how it was run."""
    n_rows, n_columns = (1_000, 50) if small else (10_000, 500)
    X, y = make_classification(n_rows, n_columns, n_informative=n_columns // 5, random_state=0)
    pipeline = make_pipeline(PCA(random_state=0), LogisticRegression(max_iter=500))
    grid = {
        "pca__n_components": [n_columns // part for part in (50, 25, 16, 10, 8, 5)],
        "logisticregression__C": [0.01, 1.0, 100.0],
    }
    search = GridSearchCV(pipeline, grid, cv=3, n_jobs=-1)

    with parallel_backend("hybrid", scatter=[X, y]):
        search.fit(X, y)

    print(f"{len(search.cv_results_['params'])} combinations of {n_rows} x {n_columns}")
    print(f"best score {search.best_score_:.4f} with {search.best_params_}")
    print(joblib_backends.last_report())


if __name__ == "__main__":
    main(small="--small" in sys.argv[1:])
