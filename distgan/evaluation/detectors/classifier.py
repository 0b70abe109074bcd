"""In-domain detector: a small convolutional classifier, trained once on the labeled shards.

Inception-v3 is trained on photographs and separates digits, spectra or drawings poorly. Its 2,048 features also need
downloaded weights and many thousands of samples. This classifier has 64 features, trained to separate the classes of
the data. Compare values only between runs on the same data with the same cached classifier.

On one kind of machine the weights are a function of the data's fingerprint, resolution and channels. Initial weights,
held-out samples and batch order come from fixed seeds. Kernels are deterministic and the number of CPU threads is
fixed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan import randomness
from distgan.config import DataConfig
from distgan.data.index.table import Index
from distgan.data.stages import stages_key
from distgan.distributed.control import Asked, Check, never
from distgan.errors import UserError
from distgan.evaluation import statistics_cache
from distgan.evaluation.precision import cpu_threads, plain_float32
from distgan.evaluation.samples import read_reals
from distgan.files import read_bounded, reason

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

log = logging.getLogger("distgan")

DIMENSION = 64
_VERSION = 2  # Raise it with every change to the training, so that no stale cached classifier is used.
_SEED = 0
_MAX_RESOLUTION = 64
_MAX_SAMPLES = 20_000
_FEWEST = 20
_INSTEAD = "set evaluation.detector=inception, or train without evaluations by evaluation.every=0"
_MAX_BYTES = 1 << 30
_MAX_FILE = 1 << 28
_BATCH = 64
_EPOCHS = 5
_FEWEST_STEPS, _MOST_STEPS = 400, 1200
_LEARNING_RATE = 3e-3
_THREADS = 1


class Classifier(nn.Module):
    """uint8 images (n, C, R, R) -> features (n, 64) and logits (n, num_classes), float32.

    Images larger than 64 pixels are averaged down to 64. Strided convolutions halve them to 4x4, or up to 7x7 if the
    size is no power of two. A convolution of that size computes the features, linear in the last hidden layer.
    """

    def __init__(self, resolution: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.shrink = max(1, resolution // _MAX_RESOLUTION)
        layers: list[nn.Module] = []
        size, width = resolution // self.shrink, channels
        for hidden in (32, 64, 128, 128)[: int(math.log2(size)) - 2]:
            layers += [nn.Conv2d(width, hidden, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
            size, width = (size + 1) // 2, hidden
        self.body = nn.Sequential(*layers, nn.Conv2d(width, DIMENSION, size))
        self.head = nn.Linear(DIMENSION, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = images.float() / 127.5 - 1.0
        if self.shrink > 1:
            inputs = F.avg_pool2d(inputs, self.shrink)
        features = self.body(inputs).flatten(1)
        return features, self.head(features.relu())


def load_classifier(
    data: DataConfig, index: Index, folder: Path, runtime: Runtime, asked: Asked = never
) -> tuple[Classifier, str]:
    """Return the classifier of these shards and the digest of its weights.

    Rank 0 reads it from the cache folder, or trains it and caches it there. Collective: call on every rank.

    Raises:
        UserError: the shards have no labels or only one class.
        Interrupted: a rank was asked to stop during the training.
    """
    validate_classifier(data, index)
    weights = weights_of("classifier", _VERSION, train_classifier, data, index, folder, runtime, asked)
    classifier = build_classifier(data.resolution, data.channels, index.num_classes)
    classifier.load_state_dict(weights)
    return classifier, statistics_cache.digest(weights)


def weights_of(
    name: str,
    version: int,
    train: Callable[[DataConfig, Index, torch.device, Check], statistics_cache.Entry],
    data: DataConfig,
    index: Index,
    folder: Path,
    runtime: Runtime,
    asked: Asked,
) -> dict[str, Tensor]:
    """Return the weights that `train` gives for these shards, from the file of this name and version in the cache.

    Rank 0 reads or writes the file. Collective: call on every rank.
    """

    def read_or_train(check: Check) -> dict[str, Tensor]:
        key = statistics_cache.key(
            index.fingerprint, data.resolution, data.channels, data.background, *stages_key(data), version
        )
        path = folder / f"{name}-{key}.safetensors"
        entry = statistics_cache.read(path)
        if entry is None:
            log.info("evaluation.detector = %s: training the classifier on %s", name, data.path)
            entry = train(data, index, runtime.device, check)
            statistics_cache.write(path, entry)
        log.info("evaluation.detector = %s: held-out accuracy %.1f %%", name, 100 * float(entry.facts["accuracy"]))
        return entry.tensors

    return runtime.run_on_main(read_or_train, asked)


def validate_classifier(data: DataConfig, index: Index) -> None:
    """Raise UserError unless the shards have labels of two classes, and enough images, to train a classifier on."""
    if index.num_classes < 2:
        raise UserError(
            f"evaluation.detector = classifier: found {'one class' if index.num_classes else 'no labels'} in "
            f"data.path = {data.path}, expected labels of at least two classes; pack the images in class subfolders, "
            f"{_INSTEAD}"
        )
    if len(index) < _FEWEST:
        _refuse_few(data, len(index))


def _refuse_few(data: DataConfig, count: int) -> NoReturn:
    raise UserError(
        f"evaluation.detector = classifier: found {count} readable images in data.path = {data.path}, "
        f"expected at least {_FEWEST}; {_INSTEAD}"
    )


class Cached(NamedTuple):
    """Classifier from a cached file."""

    network: Classifier
    hash: str
    """Digest of the weights, as in `load_classifier`."""
    image_shape: tuple[int, int, int]
    """(C, R, R)."""
    num_classes: int


def read_classifier(path: Path) -> Cached:
    """Read a classifier from the file that `load_classifier` cached. Nothing in the file is unpickled.

    Raises:
        UserError: the file is missing, damaged, not a classifier, or from a version that did not store its shape.
    """
    content = read_bounded(path, _MAX_FILE)
    again = "remove the file and run `distgan evaluate RUN`, which trains and caches the classifier again"
    try:
        tensors, facts = statistics_cache.parse(content)
    except ValueError as error:
        raise UserError(f"{path}: damaged, or not a cached classifier: {error}; {again}") from None
    if not {"resolution", "channels", "num_classes"} <= facts.keys():
        raise UserError(f"{path}: found no resolution, channels and num_classes in the file's metadata; {again}")
    resolution, channels, num_classes = (facts[name] for name in ("resolution", "channels", "num_classes"))
    try:
        if not (isinstance(resolution, int) and 4 <= resolution <= 1 << 16):
            raise ValueError(f"resolution {resolution}")
        # Compared before the network is built, so that no metadata can ask for more memory than the file has.
        shapes = tensors["body.0.weight"].shape[1], *tensors["head.weight"].shape
        if shapes != (channels, num_classes, DIMENSION):
            raise ValueError(f"weights for {shapes[0]} channels and {shapes[1]} classes")
        assert isinstance(channels, int)
        assert isinstance(num_classes, int)
        network = build_classifier(resolution, channels, num_classes)
        network.load_state_dict(tensors)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"{path}: the weights are not those of its metadata: {reason(error)}; {again}") from None
    return Cached(network, statistics_cache.digest(tensors), (channels, resolution, resolution), num_classes)


def build_classifier(resolution: int, channels: int, num_classes: int) -> Classifier:
    """Build the untrained network. Its weights depend only on its shape; global random generators stay unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        return Classifier(resolution, channels, num_classes)


def train_classifier(
    data: DataConfig, index: Index, device: torch.device, check: Check = lambda: None
) -> statistics_cache.Entry:
    """Train the classifier and return its weights with facts.

    The facts `resolution`, `channels` and `num_classes` are the network's shape. `accuracy` is that on the held-out
    samples (a tenth, at most 2,000); `held_out` is their number. Training reads at most 20,000 samples or 1 GiB of
    pixels. It runs AdamW for 5 epochs, clamped to 400-1,200 steps, on batches of 64. The learning rate decays linearly
    to 0.

    Args:
        check: called before each batch; an exception from it ends the training.
    """
    images, labels = read_labeled(data, index, check)
    return fit_classifier(images.to(device), labels.to(device), index.num_classes, check)


def fit_classifier(
    images: Tensor, labels: Tensor, num_classes: int, check: Check = lambda: None
) -> statistics_cache.Entry:
    """Fit a classifier to uint8 images (n, C, R, R) with labels (n,) int64, see `train_classifier`.

    The first tenth is held out.
    """
    device, (channels, resolution) = images.device, images.shape[1:3]
    with plain_float32(device), cpu_threads(_THREADS), torch.enable_grad():
        held_out = len(images) // 10
        network = build_classifier(resolution, channels, num_classes).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
        count = len(images) - held_out
        steps = max(_FEWEST_STEPS, min(_MOST_STEPS, _EPOCHS * count // _BATCH))
        for step, batch in enumerate(_batches(count, steps)):
            check()
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / steps)
            chosen = batch.to(device) + held_out
            loss = F.cross_entropy(network(images[chosen])[1], labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            logits = torch.cat([network(part)[1] for part in images[:held_out].split(256)])
            sharpness = calibrate(logits, labels[:held_out])
            network.head.weight.mul_(sharpness)
            network.head.bias.mul_(sharpness)
    accuracy = (logits.argmax(1) == labels[:held_out]).double().mean().item()
    weights = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    shape = {"resolution": resolution, "channels": channels, "num_classes": num_classes}
    return statistics_cache.Entry(weights, {**shape, "accuracy": accuracy, "held_out": held_out})


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """Return the factor for the logits, 1/16 to 16, that fits their probabilities to n held-out labels.

    Temperature scaling (Guo et al. 2017, section 4.2). Label smoothing improves the network but makes all its
    predictions uncertain, which lowers an Inception score. Without any error the likelihood has no maximum. n samples
    cannot distinguish an error rate of 1 / (n + 1) from 0, so the fit assumes that rate.

    Args:
        logits: shape (n, num_classes).
        labels: int64, shape (n,).
    """
    candidates = torch.logspace(-4, 4, 129, base=2.0, dtype=torch.float64)
    unknown = 1 / (len(logits) + 1)
    wide, truth = logits.double().cpu(), labels.cpu()
    losses = [F.cross_entropy(wide * candidate, truth, label_smoothing=unknown) for candidate in candidates]
    return float(candidates[torch.stack(losses).argmin()])


def read_labeled(data: DataConfig, index: Index, check: Check) -> tuple[Tensor, Tensor]:
    """Read images (n, C, R, R) uint8 and labels (n,) int64 in random order; a random subset of a large data set."""
    samples = torch.arange(len(index))
    limit = min(_MAX_SAMPLES, _MAX_BYTES // (data.channels * data.resolution**2))
    if len(index) > limit:
        drawn = randomness.uniform(_SEED, "classifier/samples", torch.arange(limit))
        samples = (drawn.double() * len(index)).long().unique()
    # Read in shard order, because remote shards are fetched whole.
    parts = []
    for part in read_reals(data, index, samples.split(256)):
        check()
        parts.append(part)
    count = sum(len(part.labels) for part in parts)
    if count < _FEWEST:
        _refuse_few(data, count)
    order = _shuffled("classifier/order", count)
    return torch.cat([part.samples for part in parts])[order], torch.cat([part.labels for part in parts])[order]


def _batches(count: int, steps: int) -> Iterator[Tensor]:
    """Yield `steps` batches of indices in [0, count), with a new addressed shuffle per epoch."""
    size = min(_BATCH, count)
    for step in range(steps):
        epoch, batch = divmod(step, count // size)
        if batch == 0:
            order = _shuffled(f"classifier/epoch {epoch}", count)
        yield order[batch * size : (batch + 1) * size]


def _shuffled(purpose: str, count: int) -> Tensor:
    """Return an addressed permutation of [0, count)."""
    return randomness.uniform(_SEED, purpose, torch.arange(count)).argsort(stable=True)
