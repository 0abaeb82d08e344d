"""Pictures come in upright, in RGB and at the right size, or not at all; and go out whole."""

import runpy
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.transform import resize

from gradleak.errors import InputError, UsageError
from gradleak.images import MAX_PIXELS, contact_sheet, load_image, save_png, save_sheet, to_uint8
from gradleak.normalisation import denormalise, normalise

DATA = Path(skimage.__file__).parent / "data"
EXAMPLES = Path(__file__).parents[1] / "examples"
LEVEL = 1 / 255

# How a picture lies in the file, by EXIF orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    with Image.open(DATA / "chelsea.png") as image:
        return image.resize((150, 100)).convert("RGB")


@pytest.fixture(scope="module")
def grey(cat: Image.Image) -> Image.Image:
    return cat.convert("L")


def as_array(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to (H, W, 3) in 0..255."""
    return pixels.permute(1, 2, 0).double().numpy() * 255


def assert_shows(path: Path, expected: np.ndarray, within: float = 1e-4) -> str | None:
    loaded = load_image(path, None)
    assert loaded.pixels.dtype == torch.float32
    assert loaded.pixels.is_contiguous()
    np.testing.assert_allclose(as_array(loaded.pixels), expected, atol=within)
    return loaded.note


def refusal(path: Path) -> str:
    """Why a picture is refused, empty if it is read; any other error is the test's failure."""
    try:
        assert load_image(path, 16).pixels.shape == (3, 16, 16)
    except InputError as error:
        return str(error)
    return ""


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing of it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_an_rgb_photograph_is_read_as_it_is(tmp_path: Path, cat: Image.Image) -> None:
    cat.save(tmp_path / "cat.png")
    assert assert_shows(tmp_path / "cat.png", np.asarray(cat)) is None


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_undone(tmp_path: Path, cat: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    cat.transpose(STORED[orientation]).save(tmp_path / "cat.png", exif=exif)
    note = assert_shows(tmp_path / "cat.png", np.asarray(cat))
    assert note == f"turned upright (EXIF orientation {orientation})"


def test_a_palette_is_looked_up(tmp_path: Path, cat: Image.Image) -> None:
    indexed = cat.quantize(60)
    indexed.save(tmp_path / "cat.png")
    colours = np.asarray(indexed.getpalette()).reshape(-1, 3)
    assert assert_shows(tmp_path / "cat.png", colours[np.asarray(indexed)]) is None


def test_a_transparent_palette_entry_is_white(tmp_path: Path, cat: Image.Image) -> None:
    indexed = cat.quantize(60)
    indexed.save(tmp_path / "cat.png", transparency=7)
    colours = np.asarray(indexed.getpalette()).reshape(-1, 3)
    colours[7] = 255
    note = assert_shows(tmp_path / "cat.png", colours[np.asarray(indexed)])
    assert note == "transparency laid on white"


def test_grey_and_bilevel_pictures_fill_all_channels(tmp_path: Path, grey: Image.Image) -> None:
    for image in (grey, grey.convert("1")):
        image.save(tmp_path / "grey.png")
        expected = np.asarray(image.convert("L"))[..., None].repeat(3, axis=2)
        assert assert_shows(tmp_path / "grey.png", expected) is None


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff", "deep.pgm"])
def test_16_bit_grey_keeps_its_brightness(tmp_path: Path, grey: Image.Image, name: str) -> None:
    deep = np.asarray(grey).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / name)
    expected = np.asarray(grey)[..., None].repeat(3, axis=2)
    assert assert_shows(tmp_path / name, expected) == "16-bit grey reduced to 8 bit"


def test_a_16_bit_photograph_turned_by_exif(tmp_path: Path, grey: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.asarray(grey.transpose(STORED[6])).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png", exif=exif)
    assert_shows(tmp_path / "deep.png", np.asarray(grey)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_laid_on_white(tmp_path: Path, cat: Image.Image, mode: str) -> None:
    opacity = Image.linear_gradient("L").resize(cat.size)
    image = cat.convert(mode)
    image.putalpha(opacity)
    image.save(tmp_path / "cat.png")
    colour = np.asarray(cat.convert(mode[:-1]).convert("RGB")).astype(float)
    share = np.asarray(opacity)[..., None] / 255
    note = assert_shows(tmp_path / "cat.png", share * colour + (1 - share) * 255, within=1)
    assert note == "transparency laid on white"


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path, cat: Image.Image) -> None:
    cat.convert("RGBA").save(tmp_path / "cat.png")
    assert assert_shows(tmp_path / "cat.png", np.asarray(cat)) is None


@pytest.mark.parametrize(("name", "within"), [("cat.tiff", 1), ("cat.jpg", 12)])
def test_printing_colours_become_rgb(
    tmp_path: Path, cat: Image.Image, name: str, within: float
) -> None:
    cat.convert("CMYK").save(tmp_path / name, quality=100)
    note = assert_shows(tmp_path / name, np.asarray(cat), within=within)
    assert note == "converted from CMYK"


def test_of_an_animation_the_first_frame_counts() -> None:
    loaded = load_image(DATA / "no_time_for_that_tiny.gif", None)
    with Image.open(DATA / "no_time_for_that_tiny.gif") as film:
        frames, first = film.n_frames, np.asarray(film.convert("RGB"))
    assert frames > 1
    assert loaded.note is not None
    assert loaded.note.startswith(f"first of {frames} frames")
    np.testing.assert_allclose(as_array(loaded.pixels), first, atol=1e-4)


@pytest.mark.parametrize("name", ["coffee.png", "rocket.jpg", "astronaut.png"])
def test_a_photograph_is_cut_to_its_centre_and_reduced_with_antialiasing(name: str) -> None:
    with Image.open(DATA / name) as image:
        full = np.asarray(image.convert("RGB")) / 255
    high, wide = full.shape[:2]
    short = min(high, wide)
    top, left = (high - short) // 2, (wide - short) // 2
    centre = full[top : top + short, left : left + short]
    loaded = load_image(DATA / name, 64)
    mine = as_array(loaded.pixels) / 255
    smooth = np.abs(mine - resize(centre, (64, 64), anti_aliasing=True)).mean()
    rough = np.abs(mine - resize(centre, (64, 64), order=0, anti_aliasing=False)).mean()
    assert loaded.pixels.shape == (3, 64, 64)
    assert smooth < 0.025
    assert smooth < rough / 2
    crop = "" if high == wide else ", centre crop"
    assert loaded.note == f"resized {wide}x{high} -> 64x64 (antialiased{crop})"


def test_a_picture_of_the_right_size_is_used_as_it_is(tmp_path: Path, cat: Image.Image) -> None:
    square = cat.crop((0, 0, 64, 64))
    square.save(tmp_path / "cat.png")
    loaded = load_image(tmp_path / "cat.png", 64)
    np.testing.assert_array_equal(to_uint8(loaded.pixels).permute(1, 2, 0), np.asarray(square))
    assert loaded.note is None


def test_cropping_alone_does_not_resample(tmp_path: Path, cat: Image.Image) -> None:
    cat.crop((0, 0, 75, 64)).save(tmp_path / "cat.png")
    loaded = load_image(tmp_path / "cat.png", 64)
    expected = np.asarray(cat)[:64, 5:69]
    np.testing.assert_array_equal(to_uint8(loaded.pixels).permute(1, 2, 0), expected)
    assert loaded.note == "cropped 75x64 -> 64x64 (centre)"


def test_a_small_picture_is_enlarged_and_that_is_said(tmp_path: Path, cat: Image.Image) -> None:
    cat.resize((20, 30)).save(tmp_path / "cat.png")
    loaded = load_image(tmp_path / "cat.png", 32)
    assert loaded.pixels.shape == (3, 32, 32)
    assert 0 <= loaded.pixels.min() < loaded.pixels.max() <= 1
    assert loaded.note == "enlarged 20x30 -> 32x32 (antialiased, centre crop)"


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="size of 0 pixels"):
        load_image(DATA / "coffee.png", 0)


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_text("meow\n")
    (tmp_path / "cat.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (tmp_path / "empty.png").touch()
    for name in ("cat.png", "cat.eps", "empty.png"):
        with pytest.raises(InputError, match=f"{name} is not a picture that can be read; give"):
            load_image(tmp_path / name, 32)
    with pytest.raises(InputError, match=r"there is no file .*dog\.png; check the name"):
        load_image(tmp_path / "dog.png", 32)
    with pytest.raises(InputError, match="is a folder; name a picture file"):
        load_image(tmp_path, 32)


@pytest.mark.parametrize("name", ["chelsea.png", "rocket.jpg"])
def test_a_truncated_photograph_is_refused(tmp_path: Path, name: str) -> None:
    whole = (DATA / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"is damaged \(.*\); get an intact copy") as caught:
        load_image(tmp_path / name, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [8_100, 10_000, 40_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, side: int) -> None:
    assert side * side > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(InputError, match="more than 64 million pixels; scale the picture down"):
        load_image(tmp_path / "bomb.png", 32)


def test_pixels_without_a_defined_white_are_refused(tmp_path: Path, grey: Image.Image) -> None:
    for mode, kind in (("F", "floating-point"), ("I", "32-bit")):
        grey.convert(mode).save(tmp_path / "odd.tiff")
        with pytest.raises(InputError, match=f"holds {kind} pixels"):
            load_image(tmp_path / "odd.tiff", None)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(["damaged.png", "damaged.jpg", "damaged.tiff", "damaged.gif"]))
    with Image.open(DATA / "chelsea.png") as image:
        image.crop((150, 50, 190, 90)).save(folder / name)
    spoilt = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(spoilt)
    assert "\n" not in refusal(folder / name)


def test_8_bit_rounding_is_to_the_nearest_and_clips() -> None:
    pixels = torch.tensor([-0.3, 0.0, 0.49 * LEVEL, 0.51 * LEVEL, 0.5, 1.0, 1.7])
    assert to_uint8(pixels).tolist() == [0, 0, 0, 1, 128, 255, 255]
    assert to_uint8(torch.arange(256, dtype=torch.float32) / 255).tolist() == list(range(256))
    with pytest.raises(InputError, match="not finite"):
        to_uint8(torch.tensor([0.5, float("nan")]))


def test_saving_and_loading_is_exact(tmp_path: Path) -> None:
    pixels = load_image(DATA / "coffee.png", 96).pixels
    save_png(tmp_path / "coffee.png", pixels)
    assert torch.equal(load_image(tmp_path / "coffee.png", 96).pixels, pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["coffee.png"]


def test_a_failing_rename_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match=r"taken\.png"):
        save_png(tmp_path / "taken.png", torch.zeros(3, 4, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_what_is_no_picture_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"before")
    for wrong in (torch.zeros(1, 3, 4, 4), torch.zeros(4, 4), torch.full((3, 4, 4), torch.nan)):
        with pytest.raises(InputError):
            save_png(tmp_path / "cat.png", wrong)
    assert (tmp_path / "cat.png").read_bytes() == b"before"


def test_normalising_follows_the_channels_and_can_be_undone() -> None:
    pixels = load_image(DATA / "astronaut.png", 32).pixels[None].double()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inputs = normalise(pixels, mean, std)
    assert inputs[0, 2, 5, 7].item() == pytest.approx((pixels[0, 2, 5, 7].item() - 0.406) / 0.225)
    torch.testing.assert_close(denormalise(inputs, mean, std), pixels)
    with pytest.raises(InputError, match="with 1 means and 3 stds"):
        normalise(pixels, (0.5,), std)
    with pytest.raises(InputError, match="one mean and std a channel"):
        normalise(pixels[0], mean, std)
    with pytest.raises(InputError, match="not positive"):
        normalise(pixels, mean, (0.2, 0.0, 0.2))


def test_a_contact_sheet_shows_every_pixel_as_a_square(tmp_path: Path) -> None:
    small = load_image(DATA / "chelsea.png", 16).pixels
    other = load_image(DATA / "coffee.png", 24).pixels
    rows = [[("true", small), ("a caption wider than its picture", other)], [("one\ntwo", other)]]
    save_sheet(tmp_path / "sheet.png", contact_sheet(rows, scale=3))
    sheet = load_image(tmp_path / "sheet.png", None).pixels
    for picture in (small, other):
        block = picture.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
        assert count_places(sheet, block) == (1 if picture is small else 2)
    edge = torch.cat([sheet[:, 0].flatten(), sheet[:, :, 0].flatten(), sheet[:, :, -1].flatten()])
    assert bool((edge == 1).all()), "the margin is white: no caption is cut off"


def count_places(sheet: torch.Tensor, block: torch.Tensor) -> int:
    """How often a block of pixels occurs in a sheet."""
    _, high, wide = block.shape
    corners = (sheet[:, : 1 - high, : 1 - wide] == block[:, :1, :1]).all(dim=0).nonzero()
    return sum(torch.equal(sheet[:, y : y + high, x : x + wide], block) for y, x in corners)


def test_captions_are_drawn(cat: Image.Image) -> None:
    pixels = torch.ones(3, 8, 8)
    blank = np.asarray(contact_sheet([[("", pixels)]], scale=2))
    assert (blank == 255).all()
    assert (np.asarray(contact_sheet([[("psnr", pixels)]], scale=2)) < 100).any()


def test_a_contact_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="of no pictures"):
        contact_sheet([[]], scale=2)
    with pytest.raises(UsageError, match="scale 0"):
        contact_sheet([[("a", torch.zeros(3, 2, 2))]], scale=0)


def test_the_example_picture_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(EXAMPLES / "draw_cat.py"))["draw_cat"]()
    with Image.open(EXAMPLES / "cat.png") as kept:
        assert drawn.size == kept.size == (256, 320)
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(kept))
