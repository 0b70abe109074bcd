"""Write what a user's stages made of a sample into the memory of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distgan.data.kinds import images
from distgan.data.kinds.decoding import SampleFormat, Values
from distgan.errors import UnreadableSampleError, UserError

_UNCLEAR_MODES = ("F", "I", "LAB", "HSV")
"""Modes of PIL whose conversion to 8 bits depends on what the numbers mean."""


def put_value(out: Values, data: Any, format: SampleFormat, background: tuple[int, int, int], name: str) -> None:
    """Write the value of one sample into `out`, an array of the run's format.

    Images are turned upright, composited on `background`, cropped to their central square, resized and converted as
    those of shards. Texts are encoded as lines are.

    Args:
        name: begins the messages.

    Raises:
        UserError: `data` is not of the kind that the run trains on.
        UnreadableSampleError: a line or a point is invalid.
    """
    if format.is_image:
        if isinstance(data, np.ndarray) and (data.shape, data.dtype) == (out.shape, out.dtype):
            out[...] = data
        else:
            images.put(out, _picture(data, background, name))
    elif out.dtype == np.uint16 and isinstance(data, str):
        format.decode_into(out, memoryview(data.encode()), "txt")
    elif out.dtype != np.uint16 and _is_float(data) and tuple(data.shape) == out.shape:
        with np.errstate(over="ignore"):
            out[...] = data.detach().double().numpy() if isinstance(data, Tensor) else data
        if not np.isfinite(out).all():
            raise UnreadableSampleError(f"{name}: made numbers that are not finite in {out.dtype}")
    else:
        expected = "a text (str)" if out.dtype == np.uint16 else f"an array of floats of shape {out.shape}"
        raise UserError(f"{name}: made {_described(data)}, expected {expected}")


def _picture(data: Any, background: tuple[int, int, int], name: str) -> Image.Image:
    if isinstance(data, Image.Image):
        if data.mode in _UNCLEAR_MODES:
            raise UserError(
                f"{name}: made a PIL image of mode {data.mode}, whose range is not that of 8 bits; make one of mode L "
                "or RGB, or a uint8 array"
            )
        return images.upright(images.flatten(data, background), images.orientation(data))
    values: Any = data
    if isinstance(data, Tensor) and data.dtype == torch.uint8:
        values = (data.movedim(0, -1) if data.dim() == 3 else data).numpy()
    if isinstance(values, np.ndarray) and values.dtype == np.uint8 and values.size:
        values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        if values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3):
            return Image.fromarray(np.ascontiguousarray(values))
    raise UserError(
        f"{name}: made {_described(data)}, expected a PIL image, a uint8 array (height, width) or (height, width, 3), "
        "or a uint8 tensor (1 or 3, height, width)"
    )


def _is_float(data: Any) -> bool:
    if isinstance(data, Tensor):
        return data.is_floating_point()
    return isinstance(data, np.ndarray) and data.dtype.kind == "f"


def _described(data: Any) -> str:
    if isinstance(data, (Tensor, np.ndarray)):
        return f"{data.dtype} of shape {tuple(data.shape)}"
    return f"a value of type {type(data).__name__}"
