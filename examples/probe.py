"""A linear probe: logistic regression on frozen features, five-fold, for examples/train.py.

    accuracy, penalties = probe(features, labels)  # [n,D], int [n] -> [FOLDS], [FOLDS]

What      How well a linear classifier separates classes by the features of a network that is not
          trained further. The penalty of each fold is chosen by cross-validation within the others.
Axes      n examples  D features  N classes  K penalties
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from pictures import rank_in_class  # noqa: E402, found by the line above

FOLDS = 5
PENALTIES = np.array(
    [1e-3, 1e-2, 1e-1, 1, 10]
)  # lambda in lambda / 2 * |w|^2, for standardised features


def fit_probe(x, labels, penalties, steps=200):
    """Logistic regression for each of K penalties. x [n,D], int [n] -> weights [D+1,K,N].

    Row D of the weights is the bias, which is not penalised. Nesterov's accelerated gradient; its
    step size is 1 / (largest curvature), so that nothing has to be tuned.
    """
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1).astype(np.float32)
    classes = labels.max() + 1
    targets = np.eye(classes, dtype=np.float32)[labels][:, None]  # [n,1,N]
    penalties = np.asarray(penalties, np.float32)[:, None]  # [K,1]
    decay = np.repeat(penalties[None], x.shape[1], axis=0)  # [D+1,K,1]
    decay[-1] = 0
    curvature = np.linalg.norm(x, 2) ** 2 / (2 * len(x))  # at most: softmax's Hessian is <= 1/2
    step_size = 1 / (curvature + penalties)
    weights = np.zeros((x.shape[1], len(penalties), classes), np.float32)
    ahead = weights
    for i in range(steps):
        logits = np.tensordot(x, ahead, 1)  # [n,K,N]
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        likely /= likely.sum(-1, keepdims=True)
        gradient = np.tensordot(x.T, likely - targets, 1) / len(x) + decay * ahead
        before = weights
        weights = ahead - step_size * gradient
        momentum = np.float32(i / (i + 3))
        ahead = weights + momentum * (weights - before)
    return weights


def probe_once(x, labels, train, test):
    """Accuracy in per cent on `test` of a probe fitted on `train`, for each penalty -> [K].

    x [n,D], labels int [n], train and test bool [n].
    """
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    weights = fit_probe(x[train], labels[train], PENALTIES)
    guess = (np.tensordot(x[test], weights[:-1], 1) + weights[-1]).argmax(-1)  # [tests,K]
    return 100 * np.mean(guess == labels[test, None], axis=0)


def probe(x, labels):
    """Accuracy in per cent of each fold, and its penalty. x [n,D], int [n] -> [FOLDS], [FOLDS]."""
    folds = rank_in_class(labels) % FOLDS
    accuracy = []
    penalties = []
    for fold in range(FOLDS):
        # The penalty is chosen among the other folds: this one plays no part in it.
        rest = folds != fold
        by_penalty = []
        for inner in range(FOLDS):
            if inner != fold:
                by_penalty.append(probe_once(x, labels, rest & (folds != inner), folds == inner))
        best = np.mean(by_penalty, axis=0).argmax()
        accuracy.append(probe_once(x, labels, rest, folds == fold)[best])
        penalties.append(PENALTIES[best])
    return np.array(accuracy), np.array(penalties)
