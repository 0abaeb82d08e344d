"""Pictures as files and as tensors: reading, writing, laying out side by side."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from gradleak.errors import InputError, UsageError
from gradleak.files import atomic_path

# Formats decoded in-process by Pillow alone: an EPS, for one, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# Below Pillow's own warning level, and enforced also where a program has switched that off.
MAX_PIXELS = 64_000_000

_EXIF_ORIENTATION = 0x0112
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_WHITE = (255, 255, 255)
_INK = (40, 40, 40)
_MARGIN = 12
_CAPTION_GAP = 4
_CAPTION_SIZE = 14


@dataclass(frozen=True)
class LoadedImage:
    """A picture read from a file: ``pixels`` (3, H, W) float32 in [0, 1] and what was done to it.

    ``note`` is one line naming every change (turned, converted, resized), None if there was none.
    """

    pixels: Tensor
    note: str | None


def load_image(path: Path | str, size: int | None) -> LoadedImage:
    """Read a picture as RGB; with a ``size``, as a ``size`` x ``size`` one.

    A picture that has that size already is used as it is; of any other the shorter side is resized
    to ``size`` pixels with antialiasing and the centre kept. EXIF rotation, palettes, grey of 1, 8
    or 16 bit and CMYK are resolved, transparency is laid on white, of an animation the first frame
    counts; the note says so. Colour profiles are not applied. Raises ``InputError`` for a file that
    is missing, no picture of a known format, damaged, or larger than ``MAX_PIXELS``, and
    ``UsageError`` for a size below one.
    """
    if size is not None and size < 1:
        raise UsageError(f"an image size of {size} pixels", "give a size of 1 or more")
    notes: list[str] = []
    picture = _to_rgb(_decode(Path(path), notes), Path(path), notes)
    if size is not None:
        picture = _fit_square(picture, size, notes)
    return LoadedImage(_to_tensor(picture), "; ".join(notes) or None)


def to_uint8(pixels: Tensor) -> Tensor:
    """Round pictures in [0, 1], any shape, to 8 bit: the nearest of 0..255, clipped to the range.

    Raises ``InputError`` where a value is not finite.
    """
    if not bool(torch.isfinite(pixels).all()):
        raise InputError("the picture has values that are not finite", "nothing can be shown of it")
    return (pixels.detach().double().clamp(0, 1) * 255).round().to(torch.uint8)


def save_png(path: Path | str, pixels: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1] as an 8-bit PNG, whole or not at all.

    Raises ``InputError`` for another shape or values that are not finite, ``OSError`` as the file
    system does.
    """
    save_sheet(path, _to_picture(pixels))


def save_sheet(path: Path | str, image: Image.Image) -> None:
    """Write a drawn picture, e.g. a contact sheet, as a PNG, whole or not at all.

    Raises ``OSError`` as the file system does.
    """
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def contact_sheet(rows: Sequence[Sequence[tuple[str, Tensor]]], *, scale: int) -> Image.Image:
    """Lay pictures (3, H, W) in [0, 1] side by side, each above its caption, in aligned columns.

    Every pixel becomes ``scale`` x ``scale`` pixels (nearest neighbour: nothing is smoothed over).
    A caption may have several lines; rows may differ in length. Raises ``UsageError`` for a scale
    below one or nothing to show, ``InputError`` as ``save_png`` does.
    """
    if scale < 1:
        raise UsageError(f"a contact sheet at scale {scale}", "give a scale of 1 or more")
    if not any(rows):
        raise UsageError("a contact sheet of no pictures", "give at least one")
    font = ImageFont.load_default(size=_CAPTION_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    cells = [[(caption, _enlarge(pixels, scale)) for caption, pixels in row] for row in rows if row]
    captions = [[ruler.multiline_textbbox((0, 0), text, font) for text, _ in row] for row in cells]
    columns = [0] * max(map(len, cells))
    for row, boxes in zip(cells, captions, strict=True):
        for column, ((_, picture), box) in enumerate(zip(row, boxes, strict=True)):
            columns[column] = max(columns[column], picture.width, int(np.ceil(box[2])))
    pictures_high = [max(picture.height for _, picture in row) for row in cells]
    captions_high = [max(int(np.ceil(box[3])) for box in boxes) for boxes in captions]

    width = sum(columns) + _MARGIN * (len(columns) + 1)
    height = sum(pictures_high) + sum(captions_high)
    height += len(cells) * (_CAPTION_GAP + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, height), _WHITE)
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, picture_high, caption_high in zip(cells, pictures_high, captions_high, strict=True):
        left = _MARGIN
        for (caption, picture), column in zip(row, columns, strict=False):
            sheet.paste(picture, (left, top + picture_high - picture.height))
            place = (left, top + picture_high + _CAPTION_GAP)
            pen.multiline_text(place, caption, fill=_INK, font=font)
            left += column + _MARGIN
        top += picture_high + _CAPTION_GAP + caption_high + _MARGIN
    return sheet


def channel_strip(channels: Tensor, count: int, scale: int) -> Tensor:
    """Lay the first ``count`` of the ``channels`` (C, H, W) side by side, grey, by their range.

    Returns a picture (3, H', W') in [0, 1], each entry ``scale`` x ``scale`` pixels. Raises
    ``InputError`` where a value is not finite.
    """
    if not bool(torch.isfinite(channels).all()):
        raise InputError("the map has values that are not finite", "nothing can be shown of it")
    shown = channels[:count].double().cpu()
    low, high = shown.amin(), shown.amax()
    grey = (shown - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    large = grey.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    framed = torch.nn.functional.pad(large, (0, _CAPTION_GAP), value=1.0)
    strip = torch.cat(list(framed), 1)
    return strip.float().expand(3, -1, -1)


def _decode(path: Path, notes: list[str]) -> Image.Image:
    """Open and decode ``path``, turned upright; every way that can fail is an ``InputError``."""
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a picture file")
    bomb = InputError(
        f"{path} has more than {MAX_PIXELS // 1_000_000} million pixels", "scale the picture down"
    )
    try:
        with warnings.catch_warnings():
            # Damaged metadata is none of our business; a picture that is too large is.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise bomb
                frames = getattr(image, "n_frames", 1)
                image.load()
                orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
                upright = ImageOps.exif_transpose(image)
                upright.format = image.format  # Turning makes a copy, which forgets it.
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise bomb from error
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}", "check the name") from error
    except PermissionError as error:
        raise InputError(f"{path} may not be read", "check its permissions") from error
    except UnidentifiedImageError as error:
        mend = f"give one of {', '.join(FORMATS)}"
        raise InputError(f"{path} is not a picture that can be read", mend) from error
    except Exception as error:
        # A decoder raises whatever a damaged file provokes: OSError, SyntaxError, struct.error …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged ({reason})", "get an intact copy") from error
    if frames > 1:
        notes.append(f"first of {frames} frames")
    if orientation in range(2, 9):
        notes.append(f"turned upright (EXIF orientation {orientation})")
    return upright


def _to_rgb(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    """Convert any colour mode to 8-bit RGB, transparency on white."""
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        image = _reduce_to_8_bit(image, path)
        notes.append("16-bit grey reduced to 8 bit")
    if mode in _ALPHA_MODES or "transparency" in image.info:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
        layer = image.convert(straight).convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency laid on white")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), layer).convert("RGB")
    if mode not in ("RGB", "L", "P", "1") and not mode.startswith("I"):
        notes.append(f"converted from {mode}")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"{path} holds {mode} pixels", "save it as RGB") from error


def _reduce_to_8_bit(image: Image.Image, path: Path) -> Image.Image:
    """Scale 16-bit grey 0..65535 to 0..255; pixels that have no defined white are refused."""
    values = np.asarray(image)
    # Pillow reads 16-bit PPM, and in older versions 16-bit PNG, as 32-bit integers.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        wide = "floating-point" if image.mode == "F" else "32-bit"
        raise InputError(f"{path} holds {wide} pixels of no known range", "save it as 8 or 16 bit")
    return Image.fromarray(np.rint(values / 257.0).astype(np.uint8))


def _fit_square(image: Image.Image, size: int, notes: list[str]) -> Image.Image:
    """Resize the shorter side to ``size`` with antialiasing and keep the centre square."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    short = min(width, height)
    change = f"{width}x{height} -> {size}x{size}"
    if short == size:
        # Whole pixels: a crop must not resample.
        left, top = (width - size) // 2, (height - size) // 2
        notes.append(f"cropped {change} (centre)")
        return image.crop((left, top, left + size, top + size))
    # One resampling of the centre box equals resize-then-crop, without rounding the longer side.
    box = (
        (width - short) / 2,
        (height - short) / 2,
        (width + short) / 2,
        (height + short) / 2,
    )
    crop = "" if width == height else ", centre crop"
    notes.append(f"{'resized' if short > size else 'enlarged'} {change} (antialiased{crop})")
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def _to_tensor(image: Image.Image) -> Tensor:
    """Turn an 8-bit RGB picture into (3, H, W) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32) / 255


def _to_picture(pixels: Tensor) -> Image.Image:
    """Turn (3, H, W) in [0, 1] into an 8-bit RGB picture."""
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.numel() == 0:
        raise InputError(f"a picture of shape {tuple(pixels.shape)}", "give one of (3, H, W)")
    return Image.fromarray(to_uint8(pixels).permute(1, 2, 0).contiguous().cpu().numpy())


def _enlarge(pixels: Tensor, scale: int) -> Image.Image:
    """Draw every pixel as a square of ``scale`` x ``scale`` pixels."""
    picture = _to_picture(pixels)
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST)
