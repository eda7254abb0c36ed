"""Any picture to the frame the network sees: open it safely and upright, resize it, normalise it.

The frame comes with the rectangle of the picture that it shows, so that attention can be drawn back in place.
"""

import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from captioner.errors import ImageError, ImageTooLargeError

Source: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Callable[[], bytes]
"""A path, "-" for the bytes of standard input, the bytes of a file, a PIL image, a uint8 array: (H, W) or
(H, W, 1) grey, (H, W, 3) RGB, (H, W, 4) RGBA; or a function that gets the bytes of a file when they are needed."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Lower-case file suffixes of the formats that `open` reads."""

MAX_PIXELS = 128_000_000
"""Largest picture that `open` decodes: more than the 108 megapixels of today's telephones."""

MAX_BYTES = 1 << 29
"""Longest file that `open` reads: room for `MAX_PIXELS` of uncompressed RGBA."""

MAX_SCANNED = 20 * MAX_PIXELS
"""Most pixels that `open` goes over in a JPEG, all scans together. Progressive files have about ten scans, but
nothing keeps one from having a hundred thousand, of a hundred bytes each."""


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become the network's input. Stored in checkpoints, as the weights depend on it."""

    size: int = 224
    """Side of the square frame, in pixels."""
    frame: Literal["stretch", "crop", "pad"] = "stretch"
    """`stretch` squeezes the whole picture into the square; `crop` fits the short side and keeps the centre;
    `pad` fits the long side and borders the rest with the mean colour."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue in 0..1, subtracted; ImageNet's by default."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue in 0..1, divided by."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise ValueError(f"size: expected 1 to 4096 pixels, got {self.size}")
        if self.frame not in ("stretch", "crop", "pad"):
            raise ValueError(f"frame: expected 'stretch', 'crop' or 'pad', got {self.frame!r}")
        if len(self.mean) != 3 or not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean: expected three numbers, got {self.mean}")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std: expected three numbers above 0, got {self.std}")


class Rectangle(NamedTuple):
    """Part of a picture, in fractions of its width and height, whatever scale it was decoded at.

    The whole picture is (0, 0, 1, 1). A border added by padding lies outside of 0..1.
    """

    left: float
    top: float
    right: float
    bottom: float


def open(source: Source, *, at_least: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the picture upright, in RGB, decoded to the end; animations give their first frame.

    Transparent parts become white. 16-bit, 32-bit and floating-point grey is scaled to 8 bits. A PIL image
    given as source stays as it is, and the result never shares its pixels.

    Args:
        source: the picture; files may be JPEG, PNG, WebP, GIF, BMP or TIFF.
        at_least: permits a JPEG file to be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster, as
            long as both sides keep this many pixels.
        max_pixels: refuse larger pictures. The size is read from the header, before anything is decoded.

    Raises:
        ImageError: if the picture cannot be read, is damaged or incomplete, or is too large.
    """
    return open_with_size(source, at_least=at_least, max_pixels=max_pixels)[0]


def open_with_size(
    source: Source, *, at_least: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """Return what `open` does, and the width and height of the whole picture, upright, in pixels.

    They are the picture's own, unless it was decoded at a fraction of its size.

    Raises:
        ImageError: as `open`.
    """
    try:
        picture = _picture(source)
        _check_size(picture, max_pixels, source)
        width, height = picture.size
        if picture is source:
            _load_alone(picture)
        if at_least and picture is not source:
            picture.draft(None, (at_least, at_least))
        upright = _to_rgb(picture)
        turn = _find_turn(picture)
        if turn is not None:
            upright = upright.transpose(turn)
        upright.info = {}  # otherwise the orientation stays there, and opening the result would turn it again
        return upright, (height, width) if turn in _ON_ITS_SIDE else (width, height)
    except ImageError:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise _damaged(source, error) from error


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the width and height that a file's header tells, as stored, without reading its pixels.

    For a first look at many files, at a fraction of the time of `open`; damage after the header is not seen.

    Raises:
        ImageError: if the header cannot be read, or `open` would refuse so large a picture.
    """
    try:
        with Path(path).open("rb") as stream:
            plugin = _plugin(stream.read(16), path)
            if os.fstat(stream.fileno()).st_size > MAX_BYTES:  # the decoder of WebP reads all of it
                raise _too_long(path)
            stream.seek(0)
            picture = plugin(stream)
            _check_size(picture, MAX_PIXELS, path)
            return picture.size
    except ImageError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def prepare(picture: Image.Image, settings: ImageSettings) -> tuple[Tensor, Rectangle]:
    """Return the network's input, float32 (3, size, size), normalised, and what part of the picture it shows.

    Args:
        picture: an RGB picture as `open` returns it.
        settings: size of the frame, how the picture is fitted into it, and the normalisation.
    """
    size = settings.size
    width, height = picture.size
    box = (0, 0, width, height)  # the part of the picture that is used, in pixels
    columns, rows, x, y = size, size, 0, 0  # what it is resized to, and where in the frame that begins
    shown = Rectangle(0.0, 0.0, 1.0, 1.0)
    if settings.frame == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        shown = Rectangle(left / width, top / height, (left + side) / width, (top + side) / height)
    elif settings.frame == "pad":
        columns = max(1, round(size * width / max(width, height)))
        rows = max(1, round(size * height / max(width, height)))
        x, y = (size - columns) // 2, (size - rows) // 2
        shown = Rectangle(-x / columns, -y / rows, (size - x) / columns, (size - y) / rows)

    # The gap shrinks by whole factors first: quick, and a picture of 1 x 1,000,000 pixels needs no memory.
    resized = picture.resize((columns, rows), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    # By numpy: torch would start threads of its own for each thread that reads, and they would wait noisily.
    mean, std = (255 * np.array(each, np.float32) for each in (settings.mean, settings.std))
    frame = np.zeros((3, size, size), np.float32)  # zero is the mean colour
    pixels = (np.asarray(resized, np.float32) - mean) / std  # (rows, columns, 3)
    frame[:, y : y + rows, x : x + columns] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(frame), shown


def name(source: Source) -> str:
    """Return what messages call the source: its path, "standard input", "image bytes"..."""
    if isinstance(source, (str, os.PathLike)):
        return "standard input" if source == "-" else os.fspath(source)
    if isinstance(source, bytes):
        return "image bytes"
    if isinstance(source, np.ndarray):
        return "image array"
    if callable(source):
        return getattr(source, "name", "image bytes")
    return str(getattr(source, "filename", "")) or "PIL image"


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Tell whether a scan of a folder takes this file: by its suffix, and unless it is hidden."""
    path = Path(path)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _picture(source: Source) -> Image.Image:
    """Return the picture with its header read and its pixels still to be decoded, where that is possible."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _from_stream(BytesIO(source), source)
    if callable(source):
        return _from_stream(BytesIO(source()), source)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"expected a path, bytes, a PIL image or a uint8 array, got {type(source).__name__}")
    if source == "-":
        return _from_stream(sys.stdin.buffer, source)
    try:
        with Path(source).open("rb") as stream:
            return _from_stream(stream, source)
    except FileNotFoundError:
        if "://" in name(source):
            raise ImageError(f"{name(source)}: no file, and addresses are not opened. Fetch it first.") from None
        raise ImageError(f"{name(source)}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name(source)}: this is a folder. Name the image files in it.") from None
    except PermissionError:
        raise ImageError(f"{name(source)}: no permission to read this file.") from None


_LOCKS = tuple(Lock() for _ in range(64))


def _load_alone(picture: Image.Image) -> None:
    """Let a PIL image read its file to the end: two threads that did so at once would mix its pixels up."""
    with _LOCKS[id(picture) // 64 % len(_LOCKS)]:
        picture.load()
        with suppress(Exception):  # EXIF data are often damaged
            picture.getexif()


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(
            f"image array: expected uint8 values in 0..255, got {array.dtype}. Scale and convert the array."
        )
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or array.size == 0:
        raise ImageError(f"image array: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}.")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def _from_stream(stream: BinaryIO, source: Source) -> Image.Image:
    start = stream.read(16)
    plugin = _plugin(start, source)
    content = start + stream.read(MAX_BYTES)
    if len(content) > MAX_BYTES:
        raise _too_long(source)
    picture = plugin(BytesIO(content))
    if plugin is JpegImagePlugin.JpegImageFile:
        scans = _count_scans(content)
        if scans * picture.width * picture.height > MAX_SCANNED:
            raise ImageTooLargeError(
                f"{name(source)}: {scans:,} scans of {picture.width} x {picture.height} pixels are too many "
                f"(limit: {MAX_SCANNED / 1e6:g} million pixels in all). Save the picture as a plain JPEG."
            )
    return picture


_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")  # but for those that nothing belongs to, except the end


def _count_scans(jpeg: bytes) -> int:
    """Return how often a JPEG file goes over its pixels; what follows its end, such as a video, does not count."""
    scans, place = 0, 2
    while marker := _MARKER.search(jpeg, place):
        place = marker.end()
        if marker[1] == b"\xd9":  # end of image
            break
        scans += marker[1] == b"\xda"  # start of scan
        place += int.from_bytes(jpeg[place : place + 2])  # the length of the segment
    return scans


def _check_size(picture: Image.Image, max_pixels: int, source: Source) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name(source)}: {width} x {height} pixels are too many "
            f"(limit: {max_pixels / 1e6:g} million). Make the picture smaller."
        )


def _too_long(source: Source) -> ImageError:
    return ImageTooLargeError(
        f"{name(source)}: the file is too long (limit: {MAX_BYTES >> 20} MB). Make the picture smaller."
    )


def _damaged(source: Source, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name(source)}: cannot read this image ({reason}). Is the file complete and undamaged?")


def _plugin(start: bytes, source: Source) -> type[ImageFile.ImageFile]:
    """Choose Pillow's decoder by the first 16 bytes of a file.

    `Image.open` is avoided: it warns of, or refuses, sizes by a global setting of the process.
    """
    if not start:
        raise ImageError(f"{name(source)}: the file is empty (0 bytes). Copy it again.")
    if start.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if start.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if start.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImagePlugin.TiffImageFile
    raise ImageError(f"{name(source)}: cannot read this image (unknown format). Convert it to JPEG or PNG.")


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Decode, and return a new RGB picture."""
    picture.load()
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        return Image.fromarray(_to_eight_bits(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        opaque = Image.new("RGB", picture.size, "white")
        opaque.paste(layer, mask=layer)
        return opaque
    return picture.convert("RGB")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale grey from the usual range that it fits in, or else from its own range, to uint8.

    Files of 32-bit integers and of floating-point numbers do not say which value is white.
    """
    values = np.nan_to_num(values.astype(np.float32), nan=0, posinf=0, neginf=0)
    black, white = float(values.min()), float(values.max())
    if black >= 0:
        black, white = 0.0, next((usual for usual in (1.0, 255.0, 65535.0) if white <= usual), white)
    return ((values - black) * (255 / max(white - black, 1e-30))).round().astype(np.uint8)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}


def _find_turn(picture: Image.Image) -> Image.Transpose | None:
    """Return how to turn a picture upright, as its EXIF data say."""
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF data are often damaged, and the picture is worth more than its orientation
        return None
