"""k-fold cross-validation of three models. Only the line with ``parallel_backend`` is the backend's."""

from joblib import parallel_backend
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import joblib_backends


def main():
    """Print the mean score of each model over ten folds."""
    X, y = load_breast_cancer(return_X_y=True)
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    models = {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression()),
        "SVC": make_pipeline(StandardScaler(), SVC()),
        "random forest": RandomForestClassifier(50, random_state=0),
    }
    with parallel_backend("hybrid"):
        for name, model in models.items():
            scores = cross_val_score(model, X, y, cv=folds, n_jobs=-1)
            print(f"{name}: {scores.mean():.4f} +/- {scores.std():.4f} over {len(scores)} folds")
            print(joblib_backends.last_report())


if __name__ == "__main__":
    main()
