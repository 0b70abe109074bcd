"""The linear probe's protocol, on features whose classes are known to be separable or not."""

from __future__ import annotations

import numpy as np
import pytest

from distgan.inference.probe import Classifier, Part, accuracy


def part(count: int, seed: int, *, informative: bool, dimension: int = 12) -> Part:
    """Three classes a distance of 4 standard deviations apart along the first axes, in units of 1000 and off center."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    features = generator.normal(size=(count, dimension))
    if informative:
        features[np.arange(count), labels] += 4
    features[:, 5] = 1  # a feature that never changes
    return Part((1000 * features + 7000).astype(np.float32), labels)


@pytest.mark.parametrize("classifier", ["svm", "logistic"])
def test_separable_classes_are_told_apart_whatever_the_units(classifier: Classifier) -> None:
    """Centres 4 sqrt 2 apart: a nearest-center rule errs in less than 2 * Phi(-2 sqrt 2) = 0.5 % of cases."""
    found = accuracy(part(400, 0, informative=True), part(1000, 1, informative=True), classifier)
    assert found > 0.98


def test_noise_is_not_told_apart() -> None:
    """A third is right by chance, give or take four standard deviations."""
    found = accuracy(
        part(300, 0, informative=False, dimension=200), part(900, 1, informative=False, dimension=200), "svm"
    )
    assert abs(found - 1 / 3) < 4 * (2 / 9 / 900) ** 0.5
