"""A linear classifier on frozen features."""

from __future__ import annotations

import warnings

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .features import Features


def linear_accuracy(train: Features, test: Features, *, standardise: bool = False, iterations: int = 100) -> float:
    """Accuracy of multinomial logistic regression on frozen features, 0 to 1.

    The two protocols differ in what they forgive. On features as they are, a direction counts by its variance; after
    standardising (MAE's probe puts a batch normalisation before the classifier) the faintest direction counts as much
    as any, so that even random networks look good.

    Args:
        train: features that the classifier learns from.
        test: features that it is judged on.
        standardise: give every feature zero mean and unit variance over `train` first.
        iterations: limit of L-BFGS iterations; reaching it is early stopping, not a failure.
    """
    regression = LogisticRegression(max_iter=iterations)
    classifier = make_pipeline(StandardScaler(), regression) if standardise else regression
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train.vectors.cpu().numpy(), train.labels.cpu().numpy())
    return float(classifier.score(test.vectors.cpu().numpy(), test.labels.cpu().numpy()))
