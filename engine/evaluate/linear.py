"""A linear classifier on frozen features."""

from __future__ import annotations

import warnings

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .features import Features


def linear_accuracy(train: Features, test: Features, *, iterations: int = 100) -> float:
    """Accuracy of multinomial logistic regression on standardised features, 0 to 1.

    Standardising stands for the batch normalisation that MAE's linear probe puts before the classifier.

    Args:
        train: features that the classifier learns from.
        test: features that it is judged on.
        iterations: limit of L-BFGS iterations; reaching it is early stopping, not a failure.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train.vectors.cpu().numpy(), train.labels.cpu().numpy())
    return float(classifier.score(test.vectors.cpu().numpy(), test.labels.cpu().numpy()))
