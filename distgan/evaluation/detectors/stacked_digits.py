"""Detector of stacked digits: one digit classifier that judges each color channel, for StackedMNIST.

The protocol of Metz et al. (2017) and Lin et al. (PacGAN, 2018, section 4.2): a classifier of single digits is applied
to the three channels, and the three digits are the class of 1,000. A classifier of the 1,000 classes would see each
class a few times only. This one is the network of `detectors.classifier`, trained on the channels of the labeled
shards.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.config import DataConfig
from distgan.data.index.table import Index
from distgan.distributed.control import Asked, Check, never
from distgan.errors import UserError
from distgan.evaluation import statistics_cache
from distgan.evaluation.detectors import classifier

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

DIMENSION = 3 * classifier.DIMENSION
CLASSES = 1000
_VERSION = 1  # Raise it with every change to the training, so that no stale cached classifier is used.


class StackedDigits(nn.Module):
    """uint8 images (n, 3, R, R) -> features (n, 192) and logits (n, 1000), float32.

    Features are those of the channels, one after another. The logit of class 100 a + 10 b + c is log p(a | R) +
    log p(b | G) + log p(c | B).
    """

    def __init__(self, digits: classifier.Classifier) -> None:
        super().__init__()
        self.digits = digits

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.digits(images.flatten(0, 1)[:, None])
        red, green, blue = F.log_softmax(logits, 1).unflatten(0, (-1, 3)).unbind(1)
        joint = red[:, :, None, None] + green[:, None, :, None] + blue[:, None, None, :]
        return features.unflatten(0, (-1, 3)).flatten(1), joint.flatten(1)


def load_stacked_digits(
    data: DataConfig, index: Index, folder: Path, runtime: Runtime, asked: Asked = never
) -> tuple[StackedDigits, str]:
    """Return the detector of these shards and the digest of its weights. Collective: call on every rank.

    Rank 0 reads the weights from the cache folder, or trains and caches them there.

    Raises:
        UserError: the shards are not stacked digits.
        Interrupted: a rank was asked to stop during the training.
    """
    validate_stacked_digits(data, index)
    weights = classifier.weights_of("stacked_digits", _VERSION, train_digits, data, index, folder, runtime, asked)
    digits = classifier.build_classifier(data.resolution, 1, 10)
    digits.load_state_dict(weights)
    return StackedDigits(digits), statistics_cache.digest(weights)


def validate_stacked_digits(data: DataConfig, index: Index) -> None:
    """Raise UserError unless the shards have the classes and channels of stacked digits."""
    if index.num_classes != CLASSES or data.channels != 3:
        raise UserError(
            f"evaluation.detector = stacked_digits: found {index.num_classes} classes in data.path = {data.path} and "
            f"data.channels = {data.channels}, expected {CLASSES} classes and 3 channels; pack digits with "
            "`distgan pack --stack`, or set evaluation.detector=classifier"
        )


def train_digits(
    data: DataConfig, index: Index, device: torch.device, check: Check = lambda: None
) -> statistics_cache.Entry:
    """Train the classifier of one channel as `classifier.train_classifier` does, and return its weights with facts.

    A digit is part of many images. Equal channels count once, so that no held-out digit is trained on.
    """
    images, labels = classifier.read_labeled(data, index, check)
    channels = images.flatten(0, 1)[:, None]
    digits = torch.stack([labels // 100, labels // 10 % 10, labels % 10], 1).flatten()
    hashes = [hashlib.blake2b(channel.numpy().tobytes(), digest_size=8).digest() for channel in channels]
    first = torch.from_numpy(np.sort(np.unique(np.array(hashes), return_index=True)[1]))
    return classifier.fit_classifier(channels[first].to(device), digits[first].to(device), 10, check)
