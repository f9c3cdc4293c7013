"""ImageDecoder, through Pillow (extra `venturi[image]`)."""

from __future__ import annotations

import io

import numpy as np
import torch

from venturi.core.errors import ModelError
from venturi.ops.table import DATA_DEPENDENT, op


@op("ImageDecoder", DATA_DEPENDENT, ulps=0.0)
def image_decoder(stream: torch.Tensor, *, pixel_format: str = "RGB") -> torch.Tensor:
    """Encoded bytes [n] uint8 → [height, width, channels] uint8; an empty image when they cannot be decoded."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as exc:
        raise ModelError("ImageDecoder needs Pillow: pip install 'venturi[image]'") from exc
    try:
        image = Image.open(io.BytesIO(stream.numpy().tobytes()))
        array = np.array(image.convert("L" if pixel_format == "Grayscale" else "RGB"))
    except (UnidentifiedImageError, OSError):
        return torch.zeros(0, 0, 1 if pixel_format == "Grayscale" else 3, dtype=torch.uint8)
    array = array[..., None] if pixel_format == "Grayscale" else array
    return torch.from_numpy(np.ascontiguousarray(array[..., ::-1] if pixel_format == "BGR" else array))
