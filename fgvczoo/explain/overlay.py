"""Drawing on pictures: heat maps and frames."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from fgvczoo.nn.prototypes import high_activation_box

BOX_COLOUR = (255, 208, 0)


def heat(activation: np.ndarray) -> np.ndarray:
    """A map (h, w) scaled to 0..1; a constant map is 0 everywhere."""
    low, high = float(activation.min()), float(activation.max())
    return (activation - low) / (high - low) if high > low else np.zeros_like(activation)


def overlay(image: np.ndarray, activation: np.ndarray, side: int) -> np.ndarray:
    """The picture (h, w, 3) under its map (h, w), its most active region framed, the longer side `side` pixels."""
    box = np.array(high_activation_box(torch.from_numpy(activation)))
    return frame(tint(image, activation, side), box * (side / max(image.shape[:2])))


def tint(image: np.ndarray, activation: np.ndarray, side: int) -> np.ndarray:
    """The picture (h, w, 3) under its map (h, w), the longer side `side` pixels."""
    large = enlarge(image, side)
    size = (large.shape[1], large.shape[0])
    strength = np.clip(cv2.resize(heat(activation), size, interpolation=cv2.INTER_CUBIC), 0, 1)
    colours = cv2.cvtColor(cv2.applyColorMap((strength * 255).astype(np.uint8), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    share = 0.55 * strength[..., None]  # cold regions keep the picture as it is
    return (large * (1 - share) + colours * share).round().astype(np.uint8)


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """The picture with its longer side at `side` pixels."""
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def frame(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The picture with a box x0, y0, x1, y1 (pixels, ends exclusive) drawn on a copy."""
    image = np.ascontiguousarray(image).copy()
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    width = max(2, max(image.shape[:2]) // 110)
    cv2.rectangle(image, (x0, y0), (max(x1 - 1, x0), max(y1 - 1, y0)), BOX_COLOUR, width)
    return image


def encode_jpeg(image: np.ndarray, quality: int = 85) -> bytes:
    """RGB uint8 (h, w, 3) as JPEG."""
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return encoded.tobytes()
