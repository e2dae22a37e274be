"""The metrics of classification, computed by scikit-learn and SciPy.

A metric that is not defined, such as a correlation with equal predictions, is 0.
"""

from __future__ import annotations

import warnings

from torch import Tensor


def class_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation coefficient.

    logits: (rows, labels). labels: (rows,), numbers of classes; both on the CPU. F1 is that of the
    second label if there are two, else the mean over the labels (macro).
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    expected, predicted = labels.long().numpy(), logits.argmax(dim=1).numpy()
    average = "binary" if logits.shape[1] == 2 else "macro"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # One class only, in the labels or in the predictions.
        return {
            "accuracy": float(accuracy_score(expected, predicted)),
            "f1": float(f1_score(expected, predicted, average=average, zero_division=0)),
            "matthews": float(matthews_corrcoef(expected, predicted)),
        }


def regression_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation. logits: (rows, 1). labels: (rows,)."""
    from scipy.stats import pearsonr, spearmanr

    predicted = logits.squeeze(1)
    is_defined = len(labels) > 1 and all(len(v.unique()) > 1 for v in (predicted, labels))
    if not is_defined:
        return {"pearson": 0.0, "spearman": 0.0}
    expected, found = labels.double().numpy(), predicted.double().numpy()
    return {
        "pearson": float(pearsonr(expected, found).statistic),
        "spearman": float(spearmanr(expected, found).statistic),
    }
