"""What a discriminator has learned of images without their labels: how well a linear classifier of its features does.

Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional GANs", ICLR 2016, section 5: a
linear L2-SVM on the features of `networks.representation`, compared here with the same on raw pixels. All numbers are
standardized by their mean and deviation over the training part, and the strength of regularization is chosen on a
fifth of it.
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
from distgan.checkpoint.restore import find_checkpoint, read_network
from distgan.config import Config, parse_config
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.data.order import permute
from distgan.errors import UserError, blaming
from distgan.evaluation.precision import plain_float32
from distgan.evaluation.samples import fill, read_reals
from distgan.inference import generation
from distgan.networks import build_discriminator
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
"""One sample in so many is held out for testing, and of the others for choosing the strength."""
_MAX_NUMBERS = 1 << 29
"""The linear solvers need 16 bytes for each number, beside the 4 that it has."""


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
    """Accuracy of a linear classifier of a discriminator's features, and of pixels, on samples it was not fitted to.

    A conditional discriminator is given class 0 with every image, so that it cannot pass the label on.

    Args:
        path: a run (its newest checkpoint, or its best) or a checkpoint.
        data: labeled shards to probe with; None takes those that the run was trained on.
        test: labeled shards to test on; None holds out an addressed fifth of the others.
        number: at most so many samples, an addressed choice, of each part.

    Raises:
        UserError: nothing to probe there, shards without labels, or more numbers than fit into memory.
    """
    if not os.fspath(path):
        raise UserError("RUN_OR_CHECKPOINT is empty; name a run folder, or a checkpoint in it")
    if number < 2 * _HELD_OUT:
        raise UserError(f"--num {number}: expected at least {2 * _HELD_OUT} samples")
    if not is_installed("sklearn"):
        raise missing_package("probe", "scikit-learn", "measure the run with `distgan evaluate`")
    found = find_checkpoint(Path(path), best=best)
    state = load_description(found)
    config = parse_config(state.config, source=f"{found}/state.json")
    if config.data.kind != "images":
        raise UserError(f"{found}: its discriminator sees {config.data.kind}, and only those of images can be probed")
    view = View(found, state, config)
    index = _labeled(config, "data.path" if data is None else "--data", config.data.path if data is None else data)
    order = torch.from_numpy(permute(np.arange(len(index)), len(index), derive_key(0, "probe/split")))
    if test is None:
        chosen = order[: len(order) // _HELD_OUT], order[len(order) // _HELD_OUT :]
        others = index
    else:
        others = _labeled(config, "--test", test)
        if (others.class_names, others.num_classes) != (index.class_names, index.num_classes):
            raise UserError(f"--test = {test}: its classes are not those of the shards to fit to")
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
        log.info("fitting %d numbers of each of %d images (%s)", report[name], len(fitting.labels), name)
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
    from sklearn.exceptions import ConvergenceWarning  # late, because these take a second
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if classifier == "svm":
        model = LinearSVC(C=strength, dual="auto", random_state=0)  # with a squared hinge loss, and so an L2-SVM
    else:
        model = LogisticRegression(C=strength, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the strength is chosen by what comes out
        return model.fit(features, labels)


class View:
    """Images as a checkpoint's discriminator sees them."""

    def __init__(self, checkpoint: Path, state: Description, config: Config) -> None:
        self.config = config
        self.growth = schedule.growth(config, state.position)
        self.batch_size = schedule.micro_batch(config, state.position)
        """As in training, since some networks compare so many samples."""
        classes = len(state.classes.counts) if state.classes else 0
        self.conditional = classes > 0
        # On no device, so that no memory is spent on sizes that the weights may not have.
        with torch.device("meta"), blaming(checkpoint / "state.json"):
            self.network = build_discriminator(config.discriminator, sample_shape(config.data, num_classes=classes))
        weights = read_network(checkpoint, "discriminator", self.network, num_classes=classes)
        self.network.load_state_dict(weights, assign=True)
        set_growth([self.network], self.growth)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network.eval().requires_grad_(False).to(self.device)

    def fit_statistics(self, index: Index, numbers: Tensor) -> None:
        """Batch norm knows only moments of a batch in training; from now on, it has those of these samples."""
        whole = numbers[: len(numbers) // self.batch_size * self.batch_size]
        read = read_reals(self.config.data, index, (whole if len(whole) else numbers).split(self.batch_size))
        with torch.no_grad(), plain_float32(self.device), reference_moments(self.network):
            recompute_statistics(self.network, (self.inputs(reals.samples) for reals in read if len(reals.labels)))

    def parts(self, index: Index, numbers: Tensor) -> tuple[Part, ...]:
        """The samples with these numbers that can be read: by the discriminator's features, and by their pixels."""
        features = pixels = torch.empty(0)
        labels = torch.empty(len(numbers), dtype=torch.int64)
        count = 0
        for reals in read_reals(self.config.data, index, numbers.split(self.batch_size)):
            if not len(reals.labels):
                continue
            seen, shown = self._features(reals.samples), generation.from_bytes(reals.samples).flatten(1)
            if count == 0:
                self._check_size(seen.shape[1], len(numbers))
                features, pixels = (torch.empty(len(numbers), rows.shape[1]) for rows in (seen, shown))
            for whole, rows in ((features, seen), (pixels, shown), (labels, reals.labels)):
                whole[count : count + len(rows)] = rows
            count += len(seen)
        if count < 2 * _HELD_OUT:
            raise UserError(f"{count} images to fit or test a probe on can be read; give shards of at least 50")
        return tuple(Part(rows[:count].numpy(), labels[:count].numpy()) for rows in (features, pixels))

    def inputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network is called with, always a whole batch."""
        shown = generation.from_bytes(fill(images, self.batch_size)).to(self.device)
        if self.growth is not None:
            shown = shrink(shown, self.growth.resolution)
        labels = torch.zeros(len(shown), dtype=torch.int64, device=self.device) if self.conditional else None
        return shown, labels

    def _features(self, images: Tensor) -> Tensor:
        with plain_float32(self.device):
            return convolution_features(self.network, *self.inputs(images))[: len(images)].cpu()

    def _check_size(self, features: int, samples: int) -> None:
        if features * samples > _MAX_NUMBERS:
            raise UserError(
                f"--num {samples}: {features} features of each are {features * samples / 1e9:.1f}e9 numbers, which do "
                f"not fit into memory; use --num {_MAX_NUMBERS // features}"
            )


def _labeled(config: Config, key: str, path: str | list[str]) -> Index:
    index = load_index(path, config.data.cache_dir)
    if index.kind != config.data.kind or index.num_classes < 2:
        what = f"{index.kind} of {index.num_classes or 'no'} classes"
        raise UserError(f"{key} = {path}: a probe tells classes of {config.data.kind} apart, and there are {what}")
    return index
