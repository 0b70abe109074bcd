"""Stages that make images of scans with captions."""

from __future__ import annotations

import io
import random
from typing import Annotated, Any

import numpy as np
import webdataset as wds
from PIL import Image
from pydantic import Field


def stages(gamma: Annotated[float, Field(gt=0)] = 1.0, exposure: float = 0.0) -> list[Any]:
    """16-bit scans at random exposures to 8 bits; the caption says which are negatives."""

    def develop(sample: dict[str, Any]) -> np.ndarray:
        light = np.asarray(Image.open(io.BytesIO(sample["png"]))) / 65535
        light = 1 - light if "negative" in sample["txt"] else light
        light = light * 2 ** random.gauss(0, exposure)
        return (255 * light.clip(0, 1) ** gamma).round().astype(np.uint8)

    return [wds.decode(only="txt"), wds.map(develop)]


stages.members = "png", "txt"
