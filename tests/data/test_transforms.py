"""Geometry is tested by drawing a mark, transforming the picture and finding the mark again."""

import pickle
import random

import cv2
import numpy as np
import pytest
import torch

from fgvczoo.data import transforms as module
from fgvczoo.data import warps
from fgvczoo.data.transforms import AUGMENTATIONS, Transform, crop_sample
from fgvczoo.data.warps import IGNORE
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import Preprocess

PROTOCOLS = ["none", "flip", "protopnet", "st-protopnet-cropped", "st-protopnet-full", "small-birds"]
PROTOCOLS += ["prototree", "prototree-cars", "random-crop", "cct-cub", "padded-crop"]
# Windows may miss a mark, and colours change it: `test_windows_are_seen_whole`.
WINDOWS = ["resized-crop", "resized-crop-16", "random-crop-zoom", "random-crop-colour", "random-crop-grey"]
WINDOWS += ["cct-cifar", "gabor"]
# Annotations do not go along: `test_pictures_alone_are_cut_and_erased`.
PICTURES = ["timm-imagenet"]
HEIGHT, WIDTH = 160, 200
# The marks must be found: nothing may be erased or recoloured.
PLAIN = Preprocess(size=(120, 130), mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture(autouse=True)
def nothing_is_erased(monkeypatch):
    """Leaves the steps of "small-birds" and ProtoTree's that move something."""
    birds, trees = AUGMENTATIONS["small-birds"], module._tilted_and_coloured
    monkeypatch.setitem(AUGMENTATIONS, "small-birds", lambda: birds()[:2])

    def uncoloured(**options):
        return [step for step in trees(**options) if type(step).__name__ != "ColorJitter"]

    monkeypatch.setattr(module, "_tilted_and_coloured", uncoloured)


def mark(x: float, y: float, half: float = 5) -> np.ndarray:
    """A white square on black with its centre at (x, y), edges blended."""
    overlap = [
        np.clip(np.minimum(place + half, np.arange(n) + 1) - np.maximum(place - half, np.arange(n)), 0, 1)
        for place, n in ((y, HEIGHT), (x, WIDTH))
    ]
    return np.repeat((255 * np.outer(*overlap)).round().astype(np.uint8)[..., None], 3, axis=2)


def centre(image: torch.Tensor, floor: float = 0.6) -> tuple[float, float]:
    """Centre of brightness of a (3, h, w) picture. floor: filled borders are darker; blended edges that are, too, are
    lost on both sides of the mark unequally, by up to a third of a pixel."""
    weight = image[0].double() * (image[0] > floor)
    rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in weight.shape)
    return float((weight.sum(0) * columns).sum() / weight.sum()), float((weight.sum(1) * rows).sum() / weight.sum())


def test_every_protocol_is_tested():
    assert list(AUGMENTATIONS) and {*PROTOCOLS, *WINDOWS, *PICTURES} == set(AUGMENTATIONS)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize(
    "preprocess, tolerance",
    [
        (Preprocess((HEIGHT, WIDTH), mean=(0, 0, 0), std=(1, 1, 1)), 0.3),  # a shift by half a pixel would show
        (Preprocess((120, 130), crop="center", mean=(0, 0, 0), std=(1, 1, 1)), 0.6),
    ],
)
def test_parts_go_where_the_mark_goes(name, preprocess, tolerance):
    transform = Transform(preprocess, name, flip_pairs=[(0, 1)])
    if name == "st-protopnet-cropped":
        tolerance = 1.0  # an elastic grid bends the mark itself
    if name == "prototree-cars":
        tolerance = max(tolerance, 0.5)  # a steep perspective shrinks one side of the mark more than the other
    rng = np.random.default_rng(1)
    swapped = 0
    for seed in range(24):
        x, y = rng.uniform(70, WIDTH - 70), rng.uniform(50, HEIGHT - 50)
        parts = np.array([[x, y, 1], [1, 2, 0], [x, y, 1]])  # a left and a right one, and one that has no side
        out = transform(mark(x, y), parts=parts, seed=(0, seed))
        found, visible = out["parts"], out["parts"][:, 2].tolist()
        assert visible in ([1, 0, 1], [0, 1, 1])
        swapped += visible[1] == 1
        own = found[int(visible[1] == 1)]
        assert own.equal(found[2]) and not found[int(visible[0] == 1)].any()
        floor = 0.0 if name == "random-crop" else 0.6  # a window fills nothing
        assert np.abs(np.array(centre(out["image"], floor)) - own[:2].numpy()).max() < tolerance
    assert swapped == 0 if name == "none" else 5 <= swapped <= 19


@pytest.mark.parametrize("name", PROTOCOLS)
def test_masks_go_where_the_picture_goes(name):
    transform = Transform(PLAIN, name)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[50:110, 70:150] = 255
    for seed in range(8):
        out = transform(image, mask=image[..., 0] // 255, seed=(seed,))
        assert out["mask"].dtype == torch.int64
        bright, inside = out["image"][0] > 0.5, out["mask"] == 1
        assert (bright & inside).sum() / (bright | inside).sum() > 0.95
        assert set(out["mask"].unique().tolist()) <= {0, 1, IGNORE}


def test_pixels_that_the_picture_does_not_have_are_ignored():
    masks = [
        Transform(PLAIN, "st-protopnet-full")(
            np.full((HEIGHT, WIDTH, 3), 200, np.uint8), mask=np.zeros((HEIGHT, WIDTH), np.uint8), seed=(seed,)
        )
        for seed in range(4)
    ]
    for out in masks:
        black, ignored = out["image"][0] < 0.3, out["mask"] == IGNORE
        assert ignored.any() and (black ^ ignored).float().mean() < 0.02


@pytest.mark.parametrize("name", PROTOCOLS)
def test_boxes_hold_what_they_held_and_little_more(name):
    transform = Transform(PLAIN, name)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[50:110, 70:150] = 255
    for seed in range(12):
        out = transform(image, boxes=np.array([[70.0, 50, 150, 110]]), seed=(seed,))
        rows, columns = np.nonzero(out["image"][0].numpy() > 0.5)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        box = out["boxes"][0].numpy()
        assert out["boxes"].dtype == torch.float32
        slack = (
            3 if name == "st-protopnet-cropped" else 1.5
        )  # an elastic side bends between the points that are followed
        assert np.abs(box - found).max() <= slack


def test_without_a_seed_nothing_moves():
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in PROTOCOLS:
        assert Transform(PLAIN, name)(image)["image"].equal(PLAIN(image))


def test_what_leaves_the_picture_is_invisible_and_has_no_area():
    preprocess = Preprocess(size=(50, 50), crop="center", crop_fraction=1.0)
    out = Transform(preprocess)(
        np.zeros((50, 100, 3), np.uint8),
        boxes=np.array([[0.0, 10, 20, 30], [20, 10, 50, 30]]),
        parts=np.array([[10.0, 10, 1], [50, 10, 1], [75, 10, 1], [60, 10, 0]]),
    )
    assert out["boxes"].tolist() == [[0, 10, 0, 30], [0, 10, 25, 30]]
    assert out["parts"].tolist() == [[0, 0, 0], [25, 10, 1], [0, 0, 0], [0, 0, 0]]


def test_no_annotations_and_empty_ones():
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for name in PROTOCOLS:
        transform = Transform(PLAIN, name)
        assert list(transform(image, seed=(0,))) == ["image"]
        assert transform(image, boxes=np.empty((0, 4)), seed=(0,))["boxes"].shape == (0, 4)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 200), (200, 3)])
def test_extreme_pictures_pass(height, width):
    image = np.full((height, width, 3), 100, np.uint8)
    for name in PROTOCOLS:
        for seed in range(6):
            out = Transform(PLAIN, name)(image, parts=np.array([[0.5, 0.5, 1]]), seed=(seed,))
            assert out["image"].shape == (3, 120, 130) and out["image"].isfinite().all()


@pytest.mark.parametrize("name", ["protopnet", "st-protopnet-cropped"])
def test_no_pixel_is_empty(name):
    white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    mask = np.ones((HEIGHT, WIDTH), np.uint8)
    for seed in range(30):
        out = Transform(PLAIN, name)(white, mask=mask, seed=(seed,))
        assert (out["image"] == 1).all() and (out["mask"] == 1).all()


def test_the_same_seed_draws_the_same_whatever_came_before():
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in PROTOCOLS[1:]:
        transform = Transform(PLAIN, name)
        first = transform(image, seed=(0, 1, 2))["image"]
        np.random.seed(0)  # noqa: NPY002 (the global streams must not matter)
        random.seed(0)
        assert transform(image, seed=(0, 1, 3))["image"].shape == first.shape
        assert transform(image, seed=(0, 1, 2))["image"].equal(first)
        assert pickle.loads(pickle.dumps(transform))(image, seed=(0, 1, 2))["image"].equal(first)
        others = [transform(image, seed=(0, 1, n))["image"] for n in range(3, 9)]
        assert not all(other.equal(first) for other in others)


def test_steps_are_drawn_independently(monkeypatch):
    """A seed shared by all steps would make every flip coincide with every other step of probability 1/2."""
    import albumentations

    steps = [albumentations.HorizontalFlip(p=0.5), albumentations.InvertImg(p=0.5)]
    monkeypatch.setitem(AUGMENTATIONS, "two", lambda: steps)
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2] = 50
    transform = Transform(Preprocess((4, 4), mean=(0, 0, 0), std=(1, 1, 1)), "two")
    seen = {round(float(transform(image, seed=(seed,))["image"][0, 0, 0]), 2) for seed in range(30)}
    assert len(seen) == 4


def test_rotation_families_and_sizes():
    rng = random.Random(0)
    angles, corners = set(), np.array([[0, 0, 1], [WIDTH, 0, 1], [WIDTH, HEIGHT, 1], [0, HEIGHT, 1.0]]).T
    for _ in range(300):
        for draw in (warps.draw_rotation, warps.draw_skew, warps.draw_shear):
            matrix = draw(rng, HEIGHT, WIDTH)
            x, y, w = matrix @ corners
            x, y = x / w, y / w
            # No corner of the picture lies inside the result: nothing of it is empty.
            assert not ((x > 1e-3) & (x < WIDTH - 1e-3) & (y > 1e-3) & (y < HEIGHT - 1e-3)).any()
            if draw is warps.draw_rotation:
                angles.add(round(np.degrees(np.arctan2(matrix[1, 0] / HEIGHT, matrix[0, 0] / WIDTH)), 1))
            if draw is warps.draw_skew:
                assert 1 - 1e-3 <= max(-x.min(), -y.min(), x.max() - WIDTH, y.max() - HEIGHT) <= 40 + 1e-3
    assert len(angles) >= 25


def test_elastic_nodes_move_by_at_most_five_pixels():
    elastic = warps.elastic(grid=10, magnitude=5)
    elastic.set_random_seed(0)
    moves = elastic.get_params_dependent_on_data({}, {})["moves"]
    assert np.abs(moves).max() == 5 and (moves == moves.round()).all()
    assert not moves[[0, -1]].any() and not moves[:, [0, -1]].any()


def test_elastic_points_go_where_their_pixels_go():
    elastic = warps.elastic(grid=10, magnitude=5)
    elastic.set_random_seed(0)
    moves = elastic.get_params_dependent_on_data({}, {})["moves"]
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    came_from = [elastic.apply(place, moves, cv2.INTER_LINEAR) for place in (columns, rows)]
    source = np.random.default_rng(0).uniform((20, 20), (WIDTH - 20, HEIGHT - 20), (50, 2))
    target = elastic.apply_to_keypoints(source, moves, shape=(HEIGHT, WIDTH)).astype(np.float32)
    read = [cv2.remap(place, target[:, :1], target[:, 1:], cv2.INTER_LINEAR)[:, 0] for place in came_from]
    assert np.abs(np.stack(read, axis=1) - source).max() < 0.2


def test_an_unknown_protocol_is_named():
    with pytest.raises(FgvczooError, match="did you mean protopnet"):
        Transform(PLAIN, "protopnets")


def test_an_argument_that_albumentations_ignores_is_an_error(monkeypatch):
    import albumentations

    monkeypatch.setitem(AUGMENTATIONS, "old", lambda: [albumentations.CoarseDropout(max_holes=1)])
    with pytest.raises(UserWarning, match="max_holes"):
        Transform(PLAIN, "old")(np.zeros((9, 9, 3), np.uint8), seed=(0,))


def test_cropping_moves_everything():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    mask = image[..., 0]
    boxes, parts = np.array([[5.0, 6, 30, 33]]), np.array([[12.0, 13, 1], [45, 13, 1], [12, 13, 0]])
    cut, cut_mask, cut_boxes, cut_parts = crop_sample((10, 8, 40, 30), image, mask, boxes, parts)
    assert np.array_equal(cut, image[8:30, 10:40]) and np.array_equal(cut_mask, mask[8:30, 10:40])
    assert cut_boxes.tolist() == [[0, 0, 20, 22]]
    assert cut_parts[:, 2].tolist() == [1, 0, 0] and cut_parts[0, :2].tolist() == [2, 5]
    assert crop_sample((-5, -5, 500, 500), image)[0].shape == image.shape
    assert crop_sample((60, 60, 70, 70), image)[0].size == 0


@pytest.mark.parametrize("name", ["random-crop", *WINDOWS[:3]])
def test_windows_are_seen_whole(name: str) -> None:
    """A window is resized to the network's size without the cut that other pictures get, its boxes with it."""
    picture = np.zeros((80, 120, 3), np.uint8)
    picture[20:60, 30:90] = 255
    cut = Transform(Preprocess(size=(64, 64), crop="center", crop_fraction=0.5), name)
    whole = Transform(Preprocess(size=(64, 64)), name)
    for number in range(5):
        boxes = np.array([[30.0, 20, 90, 60]])
        one, two = (each(picture, boxes=boxes, seed=(0, number)) for each in (cut, whole))
        assert torch.equal(one["image"], two["image"])
        x0, y0, x1, y1 = (round(float(v)) for v in one["boxes"][0])
        if x1 - x0 > 4 and y1 - y0 > 4:
            inside = one["image"][:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
            assert float(inside.min()) > 1  # white


def test_squash_center_cuts_the_middle_of_a_squashed_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (100, 60, 3), np.uint8)
    whole = Preprocess(size=(64, 64)).resize(picture)
    middle = Preprocess(size=(56, 56), crop="squash-center", crop_fraction=0.875).resize(picture)
    assert np.array_equal(whole[4:60, 4:60], middle)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_alone_are_cut_and_erased(name):
    picture = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    transform, state = Transform(Preprocess((48, 64)), name), random.getstate()
    images = [transform(picture, seed=(0, 0, row))["image"] for row in range(60)]
    assert random.getstate() == state  # timm draws from global streams, which stay as they were
    assert all(torch.equal(image, transform(picture, seed=(0, 0, row))["image"]) for row, image in enumerate(images))
    noisy = sum(float(image[0].std()) > 0.2 and image.unique().numel() > 100 for image in images)
    assert 4 < noisy < 30  # a rectangle of noise in about every fourth
    with pytest.raises(FgvczooError, match="does not move masks, boxes and parts along"):
        transform(picture, boxes=np.array([[0, 0, 9, 9]]), seed=(0, 0, 0))
    assert transform(picture, boxes=np.array([[0, 0, 9, 9]]))["boxes"].shape == (1, 4)
