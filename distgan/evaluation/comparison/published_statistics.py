"""Published statistics of real images: mean and covariance of features in an .npz file.

The arrays are `mu` and `sigma`, as in the files of pytorch-fid, clean-fid and ADM's reference batches. Such a file says
neither how many images it describes, nor how they were resized and compressed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from distgan.config import Config, EvaluationConfig
from distgan.config.error_messages import explain
from distgan.data.storage.npz import array_names, is_npz, read_array
from distgan.errors import UserError
from distgan.evaluation.detectors.features import Detector

_MAX_DIMENSION = 1 << 14
_KEYS = ("mu", "sigma")
_EXPECTED = "expected an .npz file with the mean mu, of shape (d,), and the covariance sigma, of shape (d, d)"


class PublishedStatistics(NamedTuple):
    """Statistics of an unknown number of images, float64 on the CPU."""

    path: Path
    mean: Tensor
    """Shape (d,)."""
    covariance: Tensor
    """Shape (d, d), exactly symmetric."""

    @property
    def digest(self) -> str:
        """A hash of the numbers."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.covariance.numpy().tobytes()).hexdigest()[:16]

    def check_covariance(self) -> None:
        """Raise UserError if an eigenvalue of the covariance is negative beyond float32 rounding. O(d^3)."""
        eigenvalues = torch.linalg.eigvalsh(self.covariance)
        if eigenvalues[0] < -len(self.mean) * torch.finfo(torch.float32).eps * eigenvalues[-1].abs():
            raise UserError(
                f"{self.path}: sigma is not a covariance: its eigenvalues are {eigenvalues[0]:.3g} to "
                f"{eigenvalues[-1]:.3g}, expected none below 0; compute the file again"
            )


def read_statistics(path: Path, detector: Detector) -> PublishedStatistics:
    """Read statistics of the features of a detector. Nothing in the file is unpickled.

    Raises:
        UserError: the file is missing, damaged, too large or has other arrays; the numbers are not finite, sigma is not
            symmetric, or the detector has another number of features.
    """
    if not is_npz(path):
        raise UserError(f"{path}: not a statistics file; {_EXPECTED}")
    missing = [key for key in _KEYS if key not in array_names(path)]
    if missing:
        found = ", ".join(array_names(path)[:8])[:200]
        hint = "; compare with its images by evaluate --images" if "arr_0" in array_names(path) else ""
        raise UserError(
            f"{path}: found the arrays {found or 'none'}, but no {' and '.join(missing)}; {_EXPECTED}{hint}"
        )
    mean, covariance = (read_array(path, key, 8 * _MAX_DIMENSION ** (rank + 1)) for rank, key in enumerate(_KEYS))
    shapes = f"mu {mean.dtype} {mean.shape} and sigma {covariance.dtype} {covariance.shape}"
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
        raise UserError(f"{path}: found {shapes}; {_EXPECTED}, both of floating-point numbers")
    if len(mean) != detector.dimension:
        raise UserError(
            f"{path}: found statistics of {len(mean)} features, but the detector {detector.name} has "
            f"{detector.dimension}; set the detector that the file was made with, such as detector: inception for 2048"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: mu or sigma has numbers that are not finite; compute the file again")
    wide = torch.from_numpy(covariance.astype(np.float64))
    largest = wide.abs().max()
    if (wide - wide.T).abs().max() > 1e-5 * largest:
        raise UserError(f"{path}: sigma is not symmetric, expected a covariance; compute the file again")
    return PublishedStatistics(path, torch.from_numpy(mean.astype(np.float64)), (wide + wide.T) / 2)


def with_real_statistics(config: Config, file: str) -> Config:
    """Return the config with metrics that compare with the statistics in a file, except those that name their own.

    Raises UserError for a metric that compares with samples, if none compares with statistics, and if two would have
    one name.
    """
    sections = []
    for section in config.metrics:
        values = {"metric": section.metric, **section.model_dump(exclude={"metric"})}
        if "real_statistics" in section.arguments:
            values["real_statistics"] = section.arguments["real_statistics"] or file
        elif section.asks_for("reals"):
            raise UserError(
                f"--real-statistics {file}: {section.label} compares with the samples themselves, but the file holds "
                "only the mean and covariance of their features; measure others, as in evaluation.metrics=[fid]"
            )
        sections.append(values)
    if not any("real_statistics" in values for values in sections):
        raise UserError(f"--real-statistics {file}: no metric compares with statistics; add evaluation.metrics=[fid]")
    evaluation = {**config.evaluation.model_dump(), "metrics": sections}
    try:
        return config.model_copy(update={"evaluation": EvaluationConfig.model_validate(evaluation)})
    except ValidationError as error:
        raise UserError(f"--real-statistics {file}: evaluation.{explain(error, EvaluationConfig)[1]}") from None
