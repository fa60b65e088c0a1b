"""How good judgements of whole rows are: classes against classes, numbers against numbers.

Formulas and conventions are scikit-learn's (`sklearn.metrics`) and SciPy's (`scipy.stats`), so that figures compare
with published ones. Where a metric divides by nothing it is 0 for classes (as scikit-learn's are), and None for
correlations.

Shape suffixes: N rows, C classes.
"""

from __future__ import annotations

import math

import numpy as np


def classification_metrics(predicted_N: np.ndarray, targets_N: np.ndarray, classes: int) -> dict[str, float | None]:
    """Accuracy, F1 and Matthews correlation.

    F1 is that of class 1 where there are two (GLUE's), else the mean over the classes that are there or are predicted.
    Matthews is Gorodkin's R_K for any number of classes (Computational Biology and Chemistry 28, 2004, eq. 8).

    Args:
        predicted_N, targets_N: class numbers below `classes`.
        classes: how many there are.
    """
    confusion_CC = np.zeros((classes, classes), np.float64)  # target by prediction
    np.add.at(confusion_CC, (targets_N.astype(np.int64), predicted_N.astype(np.int64)), 1)
    rows, right_C = confusion_CC.sum(), confusion_CC.diagonal()
    targets_C, predicted_C = confusion_CC.sum(1), confusion_CC.sum(0)
    both_C = targets_C + predicted_C
    f1_C = np.divide(2 * right_C, both_C, out=np.zeros(classes), where=both_C > 0)
    covariance = right_C.sum() * rows - targets_C @ predicted_C
    spread = math.sqrt((rows**2 - predicted_C @ predicted_C) * (rows**2 - targets_C @ targets_C))
    return {
        "accuracy": float(right_C.sum() / rows),
        "f1": float(f1_C[1] if classes == 2 else f1_C[both_C > 0].mean()),
        "matthews": float(covariance / spread) if spread else 0.0,
    }


def regression_metrics(predicted_N: np.ndarray, targets_N: np.ndarray) -> dict[str, float | None]:
    """Mean squared error, Pearson's correlation and Spearman's (Pearson's of the ranks, ties sharing their mean)."""
    predicted_N, targets_N = predicted_N.astype(np.float64), targets_N.astype(np.float64)
    return {
        "mse": float(np.mean((predicted_N - targets_N) ** 2)),
        "pearson": _pearson(predicted_N, targets_N),
        "spearman": _pearson(_ranks(predicted_N), _ranks(targets_N)),
    }


def _pearson(first_N: np.ndarray, second_N: np.ndarray) -> float | None:
    """None where one of them does not vary."""
    first_N, second_N = first_N - first_N.mean(), second_N - second_N.mean()
    lengths = math.sqrt(first_N @ first_N) * math.sqrt(second_N @ second_N)
    return float(np.clip(first_N @ second_N / lengths, -1.0, 1.0)) if lengths else None


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which_N]
