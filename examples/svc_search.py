"""A search over SVC from one core to all cores to a Dask cluster: the same search, the same answer.

Only the lines with ``parallel_backend`` are the backend's. A cluster elsewhere is ``scheduler="tcp://host:8786"`` in
the place of ``client=client``.
"""

import joblib
from joblib import parallel_backend
from sklearn.datasets import make_classification
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import joblib_backends


def report_on(place, search, first):
    """Print what ``search`` found, and whether it is what the ``first`` one found."""
    scores = search.cv_results_["mean_test_score"]
    same = bool((scores == first.cv_results_["mean_test_score"]).all()) and search.best_params_ == first.best_params_
    print(f"{place}: best score {search.best_score_:.4f} with {search.best_params_}, equal to one core: {same}")


def main():
    """Run the search in three places."""
    from distributed import Client, LocalCluster

    X, y = make_classification(2_000, 20, n_informative=10, random_state=0)
    grid = {"C": [0.1, 1.0, 10.0], "gamma": [0.01, 0.05, 0.2]}

    first = GridSearchCV(SVC(), grid, cv=3, n_jobs=1).fit(X, y)
    report_on("one core", first, first)

    with parallel_backend("hybrid"):
        search = GridSearchCV(SVC(), grid, cv=3, n_jobs=-1).fit(X, y)
    report_on(f"all {joblib.cpu_count()} cores", search, first)
    print(joblib_backends.last_report())

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        with parallel_backend("hybrid", client=client, scatter=[X, y]):
            search = GridSearchCV(SVC(), grid, cv=3, n_jobs=-1).fit(X, y)
        report_on("a Dask cluster", search, first)
        print(joblib_backends.last_report())


if __name__ == "__main__":
    main()
