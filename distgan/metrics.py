"""FID, KID and Inception score as ordinary `torchmetrics` metrics of images, for any trainer.

>>> from distgan.metrics import FrechetDistance, load_detector
>>> fid = FrechetDistance(load_detector("inception"))       # doctest: +SKIP
>>> fid.update(photos, real=True)                           # doctest: +SKIP
>>> fid.update(generated, real=False)                       # doctest: +SKIP
>>> fid.compute()                                           # doctest: +SKIP
"""

from __future__ import annotations

from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.detectors.loading import load_detector
from distgan.evaluation.image_metrics import FrechetDistance, InceptionScore, KernelDistance

__all__ = ["Detector", "FrechetDistance", "InceptionScore", "KernelDistance", "load_detector"]
