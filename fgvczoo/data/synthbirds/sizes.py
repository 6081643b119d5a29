"""How many classes and images a copy of the data set has, and how large the images are."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fgvczoo.errors import FgvczooError, did_you_mean


@dataclass(frozen=True)
class Size:
    """The size of a copy.

    pairs: pairs of siblings; there are twice as many classes. An even number lets class halves keep pairs whole.
    train_per_class, test_per_class: images of each class in either split.
    min_side, max_side: bounds of the width and of the height, in pixels, both ends included.

    Raises `FgvczooError` for a number that is not whole or is out of range.
    """

    pairs: int
    train_per_class: int
    test_per_class: int
    min_side: int = 120
    max_side: int = 160

    def __post_init__(self) -> None:
        least = {"pairs": 1, "train_per_class": 1, "test_per_class": 0, "min_side": 32, "max_side": self.min_side}
        for field in fields(self):
            given, bound = getattr(self, field.name), least[field.name]
            if not isinstance(given, int) or given < bound:
                raise FgvczooError(f"size.{field.name}={given!r}; expected a whole number of at least {bound}")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 2 * self.pairs

    @property
    def per_class(self) -> int:
        """Number of images of a class in both splits."""
        return self.train_per_class + self.test_per_class

    def image_id(self, class_id: int, index: int) -> int:
        """CUB's id, from 1, of image `index` of a class."""
        return class_id * self.per_class + index + 1

    def is_train(self, index: int) -> bool:
        """Whether image `index` of a class is a training image; the splits alternate, index 0 is a test image."""
        n = self.per_class
        return index * self.train_per_class // n != (index + 1) * self.train_per_class // n


SIZES: dict[str, Size] = {
    "tiny": Size(pairs=2, train_per_class=4, test_per_class=4, min_side=60, max_side=68),
    "small": Size(pairs=10, train_per_class=30, test_per_class=30),
    "large": Size(pairs=100, train_per_class=30, test_per_class=30),
}


def as_size(size: str | Size) -> Size:
    """The size of that name, or `size` itself. Raises `FgvczooError` for an unknown name."""
    if isinstance(size, Size):
        return size
    if size not in SIZES:
        raise FgvczooError(f"size={size!r}; expected {', '.join(SIZES)} or a Size{did_you_mean(str(size), SIZES)}")
    return SIZES[size]


def check_seed(seed: int) -> None:
    """Raises `FgvczooError` unless `seed` is a whole number that a stream can be seeded with."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise FgvczooError(f"seed={seed!r}; expected a whole number from 0 to 4294967295")
