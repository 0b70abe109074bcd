"""Linear probe: accuracy of a linear classifier on the discriminator's features.

Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional GANs", ICLR 2016, section 5: a
linear L2-SVM on the features of `networks.representation`, compared here with the same SVM on raw pixels. Features are
standardized by mean and standard deviation of the training part. A fifth of that part is held out to choose the
regularization strength.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distgan import schedule
from distgan.checkpoint.contents import Description, load_description
from distgan.checkpoint.loading import find_checkpoint, read_network
from distgan.config import Config, parse_config
from distgan.config.data import DataPath
from distgan.data.index.loading import load_index
from distgan.data.index.proportion import in_proportion
from distgan.data.index.table import Index
from distgan.data.order import permute
from distgan.errors import UserError, blaming
from distgan.evaluation.precision import plain_float32
from distgan.evaluation.samples import Reals, pad_batch, read_reals
from distgan.inference import generation
from distgan.networks import assign_weights, build_discriminator
from distgan.networks.layers.normalization import recompute_statistics
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.progressive import set_growth, shrink
from distgan.networks.representation import convolution_features
from distgan.networks.shape import sample_shape
from distgan.packages import is_installed, missing_package
from distgan.randomness import derive_key

log = logging.getLogger("distgan")

Classifier = Literal["svm", "logistic"]
STRENGTHS = 1e-4, 1e-3, 1e-2, 1e-1
"""Inverse strengths of regularization to choose from (C of scikit-learn)."""
_HELD_OUT = 5
"""One sample in this many is held out for testing, and one of the rest to choose the regularization strength."""
_MAX_NUMBERS = 1 << 29
"""Most features times samples. The linear solvers need 16 bytes per number, besides its own 4."""


class Part(NamedTuple):
    """Features of samples: float32 (n, d), and int64 labels (n,)."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]


def probe(
    path: str | os.PathLike[str],
    *,
    data: str | None = None,
    test: str | None = None,
    number: int = 10_000,
    classifier: Classifier = "svm",
    best: bool = False,
) -> dict[str, Any]:
    """Measure the test accuracy of linear classifiers on a discriminator's features and on pixels.

    A conditional discriminator gets class 0 with every image, so that its features cannot contain the label.

    Args:
        path: a run (its newest or best checkpoint) or a checkpoint.
        data: labeled shards to fit on; None uses the training data of the run.
        test: labeled shards to test on; None holds out an addressed fifth of the fitting shards.
        number: most samples to fit on and to test on, an addressed choice of each.

    Raises:
        UserError: there is no checkpoint, the shards have no labels, or the features do not fit into memory.
    """
    if not os.fspath(path):
        raise UserError("RUN_OR_CHECKPOINT is empty; pass a run folder, or a checkpoint in it")
    if number < 2 * _HELD_OUT:
        raise UserError(f"--num {number}: expected at least {2 * _HELD_OUT} samples")
    if not is_installed("sklearn"):
        raise missing_package("probe", "scikit-learn", "measure the run with `distgan evaluate`")
    found = find_checkpoint(path, best=best)
    state = load_description(found)
    config = parse_config(state.config, source=f"{found}/state.json")
    if config.data.kind != "images":
        raise UserError(
            f"{found}: a probe needs a discriminator of images, found one of {config.data.kind}; pass a run on images"
        )
    view = View(found, state, config)
    index = _labeled(config, "data.path" if data is None else "--data", config.data.path if data is None else data)
    order = torch.from_numpy(permute(np.arange(len(index)), len(index), derive_key(0, "probe/split")))
    if test is None:
        chosen = order[: len(order) // _HELD_OUT], order[len(order) // _HELD_OUT :]
        others = index
    else:
        others = _labeled(config, "--test", test)
        if (others.class_names, others.num_classes) != (index.class_names, index.num_classes):
            raise UserError(f"--test {test}: the classes differ from those of the fitting shards; pack both alike")
        places = permute(np.arange(len(others)), len(others), derive_key(0, "probe/test"))
        chosen = torch.from_numpy(places), order
    tested, fitted = (part[:number].sort().values for part in chosen)
    view.fit_statistics(index, fitted)
    sides = view.parts(index, fitted), view.parts(others, tested)
    report: dict[str, Any] = {
        "classifier": classifier,
        "training_samples": len(sides[0][0].labels),
        "test_samples": len(sides[1][0].labels),
    }
    for name, fitting, testing in zip(("features", "pixels"), *sides, strict=True):
        report[name] = fitting.features.shape[1]
        log.info("linear probe on %s: fitting %d images x %d features", name, len(fitting.labels), report[name])
        report[f"accuracy/{name}"] = accuracy(fitting, testing, classifier)
    return report


def accuracy(fitting: Part, testing: Part, classifier: Classifier) -> float:
    """Share of the testing part that a linear classifier of the fitting part gets right.

    Both are standardized in place.
    """
    mean, deviation = fitting.features.mean(0, dtype=np.float64), fitting.features.std(0, dtype=np.float64)
    scale = np.where(deviation > 0, deviation, 1.0).astype(np.float32)
    for part in (fitting, testing):
        np.subtract(part.features, mean.astype(np.float32), out=part.features)
        np.divide(part.features, scale, out=part.features)
    order = permute(np.arange(len(fitting.labels)), len(fitting.labels), derive_key(0, "probe/validation"))
    chosen, others = np.split(order, [len(order) // _HELD_OUT])

    def score(strength: float) -> float:
        model = _fitted(classifier, strength, fitting.features[others], fitting.labels[others])
        return float(model.score(fitting.features[chosen], fitting.labels[chosen]))

    strength = max(STRENGTHS, key=score)
    return float(_fitted(classifier, strength, *fitting).score(*testing))


def _fitted(classifier: Classifier, strength: float, features: NDArray[np.float32], labels: NDArray[np.int64]) -> Any:
    from sklearn.exceptions import ConvergenceWarning  # late, because these imports take a second
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if classifier == "svm":
        model = LinearSVC(C=strength, dual="auto", random_state=0)  # squared hinge loss, so an L2-SVM
    else:
        model = LogisticRegression(C=strength, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the strength is chosen by accuracy
        return model.fit(features, labels)


class View:
    """Discriminator of a checkpoint, as a feature extractor of images."""

    def __init__(self, checkpoint: Path, state: Description, config: Config) -> None:
        self.config = config
        self.growth = schedule.growth(config, state.images)
        self.batch_size = schedule.micro_batch(config, state.images)
        """Batch size of the training, because some networks compare the samples of a batch."""
        classes = len(state.classes.counts) if state.classes else 0
        self.conditional = classes > 0
        self.shape = sample_shape(config.data, num_classes=classes)
        # On the meta device, so that false sizes take no memory.
        with torch.device("meta"), blaming(checkpoint / "state.json"):
            self.network = build_discriminator(config.discriminator, self.shape)
        weights = read_network(checkpoint, "discriminator", self.network, num_classes=classes)
        whole = {name: stored.whole() for name, stored in weights.items()}
        assign_weights(self.network, whole, lambda: build_discriminator(config.discriminator, self.shape))
        set_growth([self.network], self.growth)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network.eval().requires_grad_(False).to(self.device)

    def fit_statistics(self, index: Index, numbers: Tensor) -> None:
        """Set the evaluation statistics of batch norm from these samples."""
        whole = numbers[: len(numbers) // self.batch_size * self.batch_size]
        read = read_reals(self.config.data, index, (whole if len(whole) else numbers).split(self.batch_size))
        with torch.no_grad(), plain_float32(self.device), reference_moments(self.network):
            recompute_statistics(self.network, (self.inputs(reals) for reals in read if len(reals.labels)))

    def parts(self, index: Index, numbers: Tensor) -> tuple[Part, ...]:
        """Return the readable samples with these numbers, as discriminator features and as pixels."""
        features = pixels = torch.empty(0)
        labels = torch.empty(len(numbers), dtype=torch.int64)
        count = 0
        for reals in read_reals(self.config.data, index, numbers.split(self.batch_size)):
            if not len(reals.labels):
                continue
            seen, shown = self._features(reals), generation.from_bytes(reals.samples).flatten(1)
            if count == 0:
                self._check_size(seen.shape[1], len(numbers))
                features, pixels = (torch.empty(len(numbers), rows.shape[1]) for rows in (seen, shown))
            for whole, rows in ((features, seen), (pixels, shown), (labels, reals.labels)):
                whole[count : count + len(rows)] = rows
            count += len(seen)
        if count < 2 * _HELD_OUT:
            raise UserError(
                f"probe: found {count} readable images to fit or test on, expected at least {2 * _HELD_OUT}; "
                "pass shards of at least 50 images"
            )
        return tuple(Part(rows[:count].numpy(), labels[:count].numpy()) for rows in (features, pixels))

    def inputs(self, reals: Reals) -> tuple[Tensor, Tensor | None]:
        """Return the network's inputs, always a full batch. Noise of dequantized images has their numbers."""
        images, numbers = (pad_batch(part, self.batch_size).to(self.device) for part in (reals.samples, reals.numbers))
        shown = generation.to_network(self.shape, images, self.config.seed, numbers)
        if self.growth is not None:
            shown = shrink(shown, self.growth.resolution)
        labels = torch.zeros(len(shown), dtype=torch.int64, device=self.device) if self.conditional else None
        return shown, labels

    def _features(self, reals: Reals) -> Tensor:
        with plain_float32(self.device):
            return convolution_features(self.network, *self.inputs(reals))[: len(reals.numbers)].cpu()

    def _check_size(self, features: int, samples: int) -> None:
        if features * samples > _MAX_NUMBERS:
            raise UserError(
                f"--num {samples}: {samples} images x {features} features are {features * samples / 1e9:.1f}e9 "
                f"numbers, expected at most {_MAX_NUMBERS / 1e9:.1f}e9; use --num {_MAX_NUMBERS // features}"
            )


def _labeled(config: Config, key: str, path: DataPath) -> Index:
    index = in_proportion(load_index(path, config.data.cache_dir))
    if index.kind != config.data.kind or index.num_classes < 2:
        what = f"{index.kind} of {index.num_classes or 'no'} classes"
        raise UserError(
            f"{key} = {path}: found {what}, expected {config.data.kind} of at least 2 classes; pass labeled shards"
        )
    return index
