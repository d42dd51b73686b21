"""Features of 8 x 8 digits from a small classifier: an extractor for ``--extractor digit_features:classifier``.

A perceptron of two hidden layers is trained on scikit-learn's digits, always from the same seed; the features are the
activations of its last hidden layer. It takes Inception's place where images are digits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

HIDDEN = (128, 64)


class Classifier:
    """uint8 images (N, 8, 8, 1) to features (N, 64)."""

    digest = f"digits-perceptron-{HIDDEN}-seed0"
    preprocessing = "grey levels over 255"

    def __init__(self) -> None:
        digits = load_digits()
        self.network = MLPClassifier(HIDDEN, random_state=0, max_iter=200).fit(digits.data / 16, digits.target)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return the activations of the last hidden layer."""
        values = images.reshape(len(images), -1) / 255
        for weight, bias in zip(self.network.coefs_[:-1], self.network.intercepts_[:-1], strict=True):
            values = np.maximum(values @ weight + bias, 0)
        return values


def classifier() -> Classifier:
    """Return the extractor."""
    return Classifier()
