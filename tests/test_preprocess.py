import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from fgvczoo import preprocess as module
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import Preprocess, read_image


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- read_image


def test_every_kind_of_source_gives_the_same_picture(picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    floats = picture.astype(np.float32) / 255
    sources = [path, str(path), path.read_bytes(), Image.fromarray(picture), picture, floats]
    sources += [torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(floats).permute(2, 0, 1)]
    for source in sources:
        image = read_image(source)
        assert image.dtype == np.uint8 and image.flags.writeable
        assert np.array_equal(image, picture)


def test_jpeg_decoders_agree(picture):
    smooth = np.array(Image.fromarray(picture).resize((90, 70), Image.Resampling.BICUBIC))
    content = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    reference = np.array(Image.open(io.BytesIO(content)))
    assert np.abs(read_image(content).astype(int) - reference).max() <= 4


def test_grey_palette_and_cmyk_become_rgb(picture):
    image = Image.fromarray(picture)
    grey = read_image(encoded(image.convert("L"), "JPEG"))
    assert grey.shape == picture.shape and (grey == grey[..., :1]).all()
    palette = image.convert("P")
    assert np.array_equal(read_image(encoded(palette, "PNG")), np.array(palette.convert("RGB")))
    cmyk = encoded(image.convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(read_image(cmyk), np.array(Image.open(io.BytesIO(cmyk)).convert("RGB")))


def test_sixteen_bit_grey_keeps_its_range():
    deep = np.array([[0, 256, 65535]], np.uint16)
    assert read_image(encoded(Image.fromarray(deep), "PNG"))[0, :, 0].tolist() == [0, 1, 255]


def test_a_picture_without_a_fixed_range_is_refused():
    with pytest.raises(FgvczooError, match="mode F"):
        read_image(Image.fromarray(np.zeros((2, 2), np.float32)))


def test_alpha_is_laid_on_white(picture):
    alpha = np.dstack([picture, np.full((40, 60), 255, np.uint8)])
    alpha[:10, :, 3] = 0
    for source in (encoded(Image.fromarray(alpha), "PNG"), alpha, Image.fromarray(alpha)):
        image = read_image(source)
        assert (image[:10] == 255).all() and np.array_equal(image[10:], picture[10:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    corner = np.zeros((32, 48, 3), np.uint8)
    corner[:16, :16] = 255
    image = Image.fromarray(corner)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = read_image(encoded(image, "JPEG", exif=exif.tobytes()))
    expected = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert upright.shape[:2] == ((32, 48) if orientation < 5 else (48, 32))
    assert upright[expected[orientation]].min() > 200 and upright[16, 16].max() < 60


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_file_is_an_error_that_names_it(picture, tmp_path, share, kind):
    content = encoded(Image.fromarray(picture), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FgvczooError, match=r"cut\.img: (corrupt|not an image)") as error:
        read_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"a page that says 404", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n"])
def test_what_is_not_an_image_is_an_error(tmp_path, content):
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    with pytest.raises(FgvczooError, match=r"page\.jpg: (corrupt|not an image)"):
        read_image(path)


def test_a_missing_file_a_folder_and_a_strange_source_are_errors(tmp_path):
    with pytest.raises(FgvczooError, match=r"none\.jpg: cannot be read"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(FgvczooError, match="cannot be read"):
        read_image(tmp_path)
    with pytest.raises(FgvczooError, match="not int"):
        read_image(3)


def test_too_many_pixels_are_refused_before_decoding(picture, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(FgvczooError, match="at most 1,000"):
        read_image(encoded(Image.fromarray(picture), "PNG"))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 4, 3), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.int32),
        np.full((4, 4, 3), 1.5),
        np.full((4, 4, 3), -0.1),
        np.full((4, 4, 3), np.nan),
        torch.zeros(4, 4, 3),
    ],
)
def test_arrays_of_another_form_are_refused(array):
    with pytest.raises(FgvczooError):
        read_image(array)


# --- Preprocess

sizes = st.integers(8, 70)
colours = st.tuples(*[st.floats(0, 1)] * 3)
values = st.builds(
    Preprocess,
    size=st.tuples(sizes, sizes),
    crop=st.sampled_from(["squash", "center"]),
    crop_fraction=st.floats(0.5, 1),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
    mean=colours,
    std=st.tuples(*[st.floats(0.05, 1)] * 3),
    channels=st.sampled_from(["RGB", "BGR"]),
    scale=st.sampled_from([1.0, 255.0]),
)


@given(values, sizes, sizes)
@settings(max_examples=60, deadline=None)
def test_a_tensor_turns_back_into_the_picture_that_made_it(preprocess, height, width):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tensor = preprocess(image)
    assert tensor.shape == (3, *preprocess.size) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert np.array_equal(preprocess.invert(tensor), preprocess.resize(image))


@given(values, sizes, sizes, st.lists(st.tuples(*[st.floats(0, 70)] * 4), max_size=4))
@settings(max_examples=60, deadline=None)
def test_boxes_come_back(preprocess, height, width, boxes):
    boxes = np.array(boxes).reshape(-1, 4)
    there = preprocess.boxes_forward(boxes, height, width)
    assert np.allclose(preprocess.boxes_backward(there, height, width), boxes)


@given(values)
@settings(max_examples=30, deadline=None)
def test_plain_values_make_the_same_value(preprocess):
    assert Preprocess(**preprocess.to_dict()) == preprocess


@pytest.mark.parametrize("crop", ["squash", "center"])
@pytest.mark.parametrize("height, width", [(90, 120), (120, 80), (30, 40)])
def test_boxes_and_masks_follow_the_pixels(crop, height, width):
    preprocess = Preprocess(size=(60, 64), crop=crop)
    box = np.array([[0.3 * width, 0.4 * height, 0.7 * width, 0.6 * height]]).round()
    x0, y0, x1, y1 = box[0].astype(int)
    image = np.zeros((height, width, 3), np.uint8)
    image[y0:y1, x0:x1] = 255
    moved = preprocess.boxes_forward(box, height, width)[0]
    for found in (preprocess.resize(image)[..., 0] > 127, preprocess.resize_mask(image[..., 0]) > 0):
        rows, columns = np.nonzero(found)
        assert np.abs([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] - moved).max() <= 1


@pytest.mark.parametrize("height, width", [(130, 97), (60, 333), (56, 56), (300, 301)])
def test_pixels_are_those_of_torchvision(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    normalize = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    for crop, resize in (
        ("squash", [transforms.Resize((56, 56))]),
        ("center", [transforms.Resize(64), transforms.CenterCrop(56)]),
    ):
        expected = transforms.Compose([*resize, *normalize])(Image.fromarray(image))
        torch.testing.assert_close(Preprocess((56, 56), crop=crop)(image), expected, rtol=0, atol=1e-5)


def test_channel_order_and_range():
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0] = 255
    caffe = Preprocess((4, 4), mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0), channels="BGR", scale=255.0)
    assert caffe(image)[:, 0, 0].tolist() == [-104.0, -117.0, 132.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": "middle"},
        {"interpolation": "area"},
        {"channels": "GBR"},
        {"size": (0, 4)},
        {"size": (4, 4, 4)},
        {"std": (1, 0, 1)},
        {"mean": (0, 0)},
        {"crop_fraction": 0},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(FgvczooError):
        Preprocess(**wrong)


@pytest.mark.parametrize("channels, scale", [("RGB", 1.0), ("BGR", 255.0)])
def test_a_batch_is_normalised_as_its_pictures_are(channels, scale):
    preprocess = Preprocess(size=(6, 5), channels=channels, scale=scale)
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    found = preprocess.normalize_batch(torch.from_numpy(images))
    assert found.is_contiguous() and torch.equal(found, torch.stack([preprocess.normalize(image) for image in images]))
