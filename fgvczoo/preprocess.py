"""From a picture to the tensor that a network reads, and back: one value that travels with weights."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fgvczoo.errors import FgvczooError

_INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
# A picture is refused above this many pixels: decoding a small file must not take gigabytes. Below Pillow's own limit.
MAX_PIXELS = 150_000_000
# Filters that torch has, too, anti-aliased; and pixels from which on it is worth it.
_OF_TORCH, _LARGE = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}, 40_000
# Sizes come with weights that a stranger may have written: no more than these are made of a picture.
MAX_SIDE, MIN_CROP_FRACTION = 4096, 0.1


def read_image(source: Any, name: str | None = None) -> np.ndarray:
    """An image as RGB uint8 (H, W, 3).

    `source`: a path, encoded bytes, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) of uint8 or of floats in
    0..1, or a tensor (3, H, W) of uint8 or of floats in 0..1. Grey, 16-bit grey, palette and CMYK become RGB, alpha is
    laid on white, EXIF orientation is applied. `name`: what messages call encoded bytes.

    Raises `FgvczooError` naming the file when it is missing, is not an image, is cut or has over `MAX_PIXELS` pixels.
    """
    if isinstance(source, (str, Path, bytes)):
        return _decode(*_content(source, name))
    if isinstance(source, Image.Image):
        return np.array(_to_rgb(source, "the given image"))
    if isinstance(source, Tensor):
        if source.ndim != 3 or source.shape[0] != 3:
            raise FgvczooError(f"an image tensor must be (3, H, W), got {tuple(source.shape)}")
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy().transpose(1, 2, 0)
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source)
    raise FgvczooError(f"an image is a path, bytes, a PIL image, an array or a tensor, not {type(source).__name__}")


def read_mask(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """A picture of class indices as uint8 (H, W): one channel of 8 bits, or a palette, whose numbers are the classes.

    Raises `FgvczooError` as `read_image` does, and where pixels are colours.
    """
    content, name = _content(source, name)
    with _opened(content, name) as image:
        if image.mode not in ("1", "L", "P"):
            raise FgvczooError(f"{name}: pixels of mode {image.mode}; expected a class number a pixel, grey or palette")
        return np.array(image).astype(np.uint8)


def image_size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Height and width of what `read_image` gives, without decoding its pixels."""
    with _opened(*_content(source, name)) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
        return (image.width, image.height) if turned else (image.height, image.width)


def _content(source: str | Path | bytes, name: str | None) -> tuple[bytes, str]:
    """The bytes of an encoded image and its name in messages."""
    if isinstance(source, bytes):
        return source, name or "the given bytes"
    path = Path(source)
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        reason = error.strerror or error
        raise FgvczooError(f"{path}: cannot be read ({reason}); give the path of an image file") from None


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """Encoded bytes as a PIL image whose pixels are read inside the block."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the limit here
            image = Image.open(io.BytesIO(content))
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise FgvczooError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"corrupt image ({error})"
        raise FgvczooError(f"{name}: {reason}; replace or remove it") from None


def _decode(content: bytes, name: str) -> np.ndarray:
    with _opened(content, name) as image:
        # cv2 decodes a plain RGB JPEG faster and fills the rest of a cut one with grey: only whole files go there.
        if image.format == "JPEG" and image.mode == "RGB" and not image.getexif():
            decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            if decoded is not None and content.rstrip(b"\0")[-2:] == b"\xff\xd9":
                return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB, dst=decoded)
        return np.array(_to_rgb(image, name))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise FgvczooError(f"{name}: pixels of mode {image.mode} have no fixed range; save it with 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise FgvczooError(f"an image array must be (H, W), (H, W, 3) or (H, W, 4) and not empty, got {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise FgvczooError("a floating image must lie in 0..1 and be finite; normalisation is done here")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise FgvczooError(f"an image array must be uint8 or floating in 0..1, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return np.array(_to_rgb(Image.fromarray(array), "the given array"))


def _resized_by_torch(image: np.ndarray, height: int, width: int, *, mode: str) -> np.ndarray:
    # In this order of calls torch sees that channels lie side by side, and leaves them so.
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode=mode, antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Preprocess:
    """Resizing and normalisation as a plain value.

    size: height, width after resizing.
    crop: "squash" resizes to `size` without keeping the aspect ratio; "center" resizes the shorter side so that
        `size` is `crop_fraction` of it, and cuts the middle; "squash-center" resizes like "squash", such that `size` is
        `crop_fraction` of it, and cuts the middle.
    interpolation: "bilinear", "bicubic" or "nearest", Pillow's: the first two are anti-aliased when shrinking. This is
        what torchvision's `Resize` does with pictures, so published numbers hold.
    mean, std: per channel, in the order of `channels`, for values in 0..`scale`.
    channels: "RGB" or "BGR".
    scale: the value of a full channel, 1.0 or 255.0.
    """

    size: tuple[int, int] = (224, 224)
    crop: str = "squash"
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channels: str = "RGB"
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        object.__setattr__(self, "mean", tuple(float(n) for n in self.mean))
        object.__setattr__(self, "std", tuple(float(n) for n in self.std))
        for name, given, known in (
            ("crop", self.crop, ("squash", "center", "squash-center")),
            ("interpolation", self.interpolation, tuple(_INTERPOLATIONS)),
            ("channels", self.channels, ("RGB", "BGR")),
        ):
            if given not in known:
                raise FgvczooError(f"preprocess.{name}={given!r}; expected one of {', '.join(known)}")
        if len(self.size) != 2 or min(self.size) < 1 or max(self.size) > MAX_SIDE:
            raise FgvczooError(f"preprocess.size={self.size}; expected height and width, both in 1..{MAX_SIDE}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise FgvczooError("preprocess.mean and std need three numbers each, std above 0")
        if not MIN_CROP_FRACTION <= self.crop_fraction <= 1:
            raise FgvczooError(
                f"preprocess.crop_fraction={self.crop_fraction}; expected a number in [{MIN_CROP_FRACTION}, 1]"
            )

    def resize(self, image: np.ndarray, *, fast: bool = False) -> np.ndarray:
        """RGB uint8 (H, W, 3) -> RGB uint8 (h, w, 3) of `size`.

        fast: by torch's filters, four times as fast as Pillow's and the same within one level of 255; where the picture
            is small Pillow's all the same.
        """
        interpolation = _INTERPOLATIONS[self.interpolation]
        if fast and image.shape[0] * image.shape[1] >= _LARGE and interpolation in _OF_TORCH:
            return self._resize(image, interpolation, partial(_resized_by_torch, mode=_OF_TORCH[interpolation]))
        return self._resize(image, interpolation)

    def resize_mask(self, mask: np.ndarray) -> np.ndarray:
        """Class indices uint8 (H, W) -> uint8 (h, w), by nearest neighbour, aligned with `resize`."""
        return self._resize(mask, Image.Resampling.NEAREST)

    def normalize(self, image: np.ndarray) -> Tensor:
        """RGB uint8 (h, w, 3) -> float32 (3, h, w)."""
        pixels = torch.empty((3, *image.shape[:2]))
        self._normalize(image, pixels)
        return pixels

    def normalize_batch(self, images: Tensor) -> Tensor:
        """RGB uint8 (B, h, w, 3) -> float32 (B, 3, h, w), each as `normalize` makes it; pinned where there is a GPU."""
        batch, height, width, _ = images.shape
        pixels = torch.empty((batch, 3, height, width), pin_memory=torch.cuda.is_available())
        for image, out in zip(images.numpy(), pixels):
            self._normalize(image, out)
        return pixels

    def _normalize(self, image: np.ndarray, out: Tensor) -> None:
        order = (2, 1, 0) if self.channels == "BGR" else (0, 1, 2)
        values = np.arange(256, dtype=np.float32) * np.float32(self.scale / 255)
        planes, pixels = cv2.split(np.ascontiguousarray(image)), out.numpy()
        for channel, source in enumerate(order):  # a table of 256 values: much faster than arithmetic on pixels
            table = (values - np.float32(self.mean[channel])) / np.float32(self.std[channel])
            cv2.LUT(planes[source], table, dst=pixels[channel])

    def __call__(self, image: np.ndarray) -> Tensor:
        """RGB uint8 (H, W, 3) -> float32 (3, h, w)."""
        return self.normalize(self.resize(image))

    def invert(self, tensor: Tensor) -> np.ndarray:
        """float32 (3, h, w) -> RGB uint8 (h, w, 3): the picture as the network saw it."""
        pixels = tensor.detach().cpu().float().numpy().transpose(1, 2, 0)
        pixels = pixels * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        if self.channels == "BGR":
            pixels = pixels[..., ::-1]
        return np.rint(np.clip(pixels * (255 / self.scale), 0, 255)).astype(np.uint8)

    def boxes_forward(self, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
        """(n, 4) x0, y0, x1, y1 in pixels of an original of `height` x `width` -> pixels of the transformed image."""
        (top, left, scale_y, scale_x), _ = self._geometry(height, width)
        return np.asarray(boxes, np.float64) * (scale_x, scale_y, scale_x, scale_y) - (left, top, left, top)

    def boxes_backward(self, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
        """The inverse of `boxes_forward`."""
        (top, left, scale_y, scale_x), _ = self._geometry(height, width)
        return np.add(boxes, (left, top, left, top)) / (scale_x, scale_y, scale_x, scale_y)

    def _resize(
        self,
        image: np.ndarray,
        interpolation: Image.Resampling,
        resized: Callable[[np.ndarray, int, int], np.ndarray] | None = None,
    ) -> np.ndarray:
        """resized: what makes another height and width of a picture; Pillow by default."""
        (top, left, _, _), (full_h, full_w) = self._geometry(*image.shape[:2])
        if image.shape[:2] != (full_h, full_w) and resized is not None:
            image = resized(image, full_h, full_w)
        elif image.shape[:2] != (full_h, full_w):
            image = np.array(Image.fromarray(image).resize((full_w, full_h), interpolation))
        return image[top : top + self.size[0], left : left + self.size[1]]

    def _geometry(self, height: int, width: int) -> tuple[tuple[int, int, float, float], tuple[int, int]]:
        """((top, left) of the cut after resizing, scale in y, in x), (height, width after resizing)."""
        if self.crop == "squash":
            return (0, 0, self.size[0] / height, self.size[1] / width), self.size
        goal_h, goal_w = (round(length / self.crop_fraction) for length in self.size)
        # One side meets its goal exactly; the other is rounded down, as in torchvision.
        if self.crop == "squash-center":
            full_h, full_w = goal_h, goal_w
        elif goal_h * width >= goal_w * height:
            full_h, full_w = goal_h, max(goal_h * width // height, self.size[1])
        else:
            full_h, full_w = max(goal_w * height // width, self.size[0]), goal_w
        top, left = round((full_h - self.size[0]) / 2), round((full_w - self.size[1]) / 2)
        return (top, left, full_h / height, full_w / width), (full_h, full_w)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a config file; `Preprocess(**d)` builds it again."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
