"""Any picture to the frame the network sees: open it safely and upright, resize it, normalise it.

The frame comes with the rectangle of the picture that it shows, so that attention can be drawn back in place.
"""

import ctypes
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from threading import Condition, Lock
from typing import Annotated, BinaryIO, Literal, Protocol, TypeAlias, cast

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from captioner import config
from captioner.caption import Rectangle
from captioner.config import Range
from captioner.errors import ImageError, ImageTooLargeError
from captioner.files import is_file

try:
    from PIL import AvifImagePlugin  # since Pillow 11.3

    _AVIF: type[ImageFile.ImageFile] | None = AvifImagePlugin.AvifImageFile if AvifImagePlugin.SUPPORTED else None
except ImportError:
    _AVIF = None

# Pillow logs some damages without naming the file, which the errors below do. Python would print these records to
# standard error, unless the program has set up logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class BinaryFile(Protocol):
    """An open file of bytes, such as `open(path, "rb")` or `io.BytesIO`."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes."""
        ...


Source: TypeAlias = (
    str
    | os.PathLike[str]
    | os.PathLike[bytes]
    | bytes
    | BinaryFile
    | Image.Image
    | np.ndarray
    | Callable[[], bytes]
)
"""A path, "-" for the bytes of standard input, the contents of a file as bytes, an open file of bytes (read from
its start if it can seek), a PIL image, a uint8 array: (H, W) or (H, W, 1) grey, (H, W, 3) RGB, (H, W, 4) RGBA; or a
function that gets the contents of a file when they are needed. For a path in bytes, pass `os.fsdecode(path)`."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | ({".avif"} if _AVIF else set())
)
"""Lower-case file suffixes of the formats that `open` reads. AVIF is one where Pillow decodes it."""

OTHER_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jxl"}) - SUFFIXES
"""Lower-case file suffixes of photographs in formats that `open` does not read."""

MAX_PIXELS = 128_000_000
"""Largest picture that `open` decodes: more than the 108 megapixels of today's telephones."""

MAX_BYTES = 1 << 29
"""Longest file that `open` reads: room for `MAX_PIXELS` of uncompressed RGBA."""

MAX_SCANNED = 20 * MAX_PIXELS
"""Most pixels that `open` goes over in a JPEG, all scans together. Progressive files have about ten scans, but
nothing keeps one from having a hundred thousand, of a hundred bytes each."""

MAX_DECODED = 1 << 31
"""Most bytes of memory for the pictures that all threads of the process decode at a time. Threads that would exceed
it wait, and a picture that exceeds it alone is refused. It has room for one picture of `MAX_PIXELS`. The contents
of files, up to `MAX_BYTES` each, are not counted."""

PIXEL_BYTES = 16
"""Bytes of memory that a pixel counts towards `MAX_DECODED`: the most that was measured over all formats, for WebP.
Pillow stores RGB in 4, there are up to three copies at a time, and decoders have buffers of their own."""


Mean = Annotated[float, Range(0, 1)]
Deviation = Annotated[float, Range(0.001, 1000)]


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become the network's input. Stored in model files, as the weights depend on it."""

    size: Annotated[int, Range(1, 1024)] = 224
    """Side of the square frame in pixels. A batch of larger frames would need gigabytes."""
    frame: Literal["stretch", "crop", "pad"] = "stretch"
    """`stretch` resizes the picture to the square; `crop` resizes its short side and keeps the centre; `pad`
    resizes its long side and fills the rest with the mean colour."""
    mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue, which is subtracted. Default: of ImageNet."""
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue, which is divided by."""

    def __post_init__(self) -> None:
        config.check(self)


def open(source: Source, *, at_least: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the picture upright, in RGB, decoded to the end; animations give their first frame.

    A JPEG file may lack its end marker, if no pixel is missing, and ancillary chunks of a PNG file may be damaged.
    Transparent parts become white. 16-bit, 32-bit and floating-point grey is scaled to 8 bits. A PIL image
    given as source stays as it is, and the result never shares its pixels.

    Args:
        source: the picture; files may be JPEG, PNG, WebP, GIF, BMP, TIFF or, where Pillow decodes it, AVIF.
        at_least: permits a JPEG file to be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster, as
            long as both sides keep this many pixels.
        max_pixels: refuse larger pictures. The size is read from the header, before anything is decoded.

    Raises:
        ImageError: if the picture cannot be read, is damaged or incomplete, has more than `max_pixels`, or needs
            more memory than `MAX_DECODED`.
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
    with _opened(source, at_least, max_pixels) as opened:
        return opened


def open_frame(
    source: Source, settings: ImageSettings, *, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, Rectangle, tuple[int, int]]:
    """Open and prepare a picture; return what `prepare` does, and the size as `open_with_size`.

    The picture counts towards `MAX_DECODED` until it is prepared, so any number of threads may call this at once.

    Raises:
        ImageError: as `open`.
    """
    with _opened(source, 2 * settings.size, max_pixels) as (picture, size):
        return *prepare(picture, settings), size


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the width and height that a file's header tells, as stored, without reading its pixels.

    For a first look at many files, at a fraction of the time of `open`; damage after the header is not seen.

    Raises:
        ImageError: if the header cannot be read, or `open` would refuse so large a picture.
    """
    try:
        with Path(path).open("rb") as stream:
            plugin = _plugin(stream.read(HEAD_BYTES), path)
            if os.fstat(stream.fileno()).st_size > MAX_BYTES:  # the decoder of WebP reads all of it
                raise _too_long(path)
            stream.seek(0)
            try:
                picture: Image.Image = plugin(stream)
            except Exception:  # perhaps of a kind that `open` repairs
                picture = _picture(path)
            _check_size(picture, MAX_PIXELS, path)
            return picture.size
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def prepare(picture: Image.Image, settings: ImageSettings) -> tuple[np.ndarray, Rectangle]:
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
    mean, std = (255 * np.array(each, np.float32) for each in (settings.mean, settings.std))
    frame = np.zeros((3, size, size), np.float32)  # zero is the mean colour
    pixels = (np.asarray(resized, np.float32) - mean) / std  # (rows, columns, 3)
    frame[:, y : y + rows, x : x + columns] = pixels.transpose(2, 0, 1)
    return frame, shown


def name(source: Source) -> str:
    """Return what messages call the source: its path, "standard input", "image bytes"..."""
    if isinstance(source, (str, os.PathLike)):
        return "standard input" if source == "-" else os.fsdecode(source)
    if isinstance(source, bytes):
        return "image bytes"
    if isinstance(source, np.ndarray):
        return "image array"
    if callable(source):
        return getattr(source, "name", "image bytes")
    if hasattr(source, "read"):
        path = getattr(source, "name", None)
        return path if isinstance(path, str) else "image file"
    return str(getattr(source, "filename", "")) or "PIL image"


def is_source(value: object) -> bool:
    """Return whether a value has a type of `Source`, and so is one picture and not an iterable of them."""
    return (
        isinstance(value, (str, os.PathLike, bytes, Image.Image, np.ndarray))
        or callable(value)
        or hasattr(value, "read")
    )


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Tell whether a scan of a folder takes this file: by its suffix, and unless it is hidden."""
    path = Path(path)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def is_or_names_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a picture, by its suffix or its first bytes, and so must not be overwritten."""
    if Path(path).suffix.lower() in SUFFIXES | OTHER_SUFFIXES:
        return True
    if not is_file(path):
        return False
    try:
        with Path(path).open("rb") as file:
            _plugin(file.read(HEAD_BYTES), path)
    except (ImageError, OSError):
        return False
    return True


class _Budget:
    """An amount that threads share. Those that need more than is left wait, in the order in which they ask."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.reset()

    def reset(self) -> None:
        """Give everything back."""
        self._used = 0
        self._turn = Lock()
        self._returned = Condition()

    @contextmanager
    def take(self, part: int) -> Iterator[None]:
        """Hold a part of the amount within the context. A thread that holds a part must not ask for another."""
        with self._turn, self._returned:
            self._returned.wait_for(lambda: self._used + part <= self.amount)
            self._used += part
        try:
            yield
        finally:
            with self._returned:
                self._used -= part
                self._returned.notify()


_budget = _Budget(MAX_DECODED)
if hasattr(os, "register_at_fork"):  # a child process does not have the threads that would give back their parts
    os.register_at_fork(after_in_child=_budget.reset)


@contextmanager
def _opened(source: Source, at_least: int | None, max_pixels: int) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Give what `open_with_size` returns. Until the context ends, the picture counts towards `MAX_DECODED`."""
    with ExitStack() as held:
        yield _decode(source, at_least, max_pixels, held)


def _decode(
    source: Source, at_least: int | None, max_pixels: int, held: ExitStack
) -> tuple[Image.Image, tuple[int, int]]:
    try:
        picture = _picture(source)
        _check_size(picture, max_pixels, source)
        width, height = picture.size
        if picture is not source and isinstance(picture, JpegImagePlugin.JpegImageFile):
            picture = _check_jpeg(picture, source)
        if picture is not source and at_least:
            picture.draft(None, (at_least, at_least))
        # The decoder of a progressive JPEG holds the coefficients of the whole picture.
        decoded = (width, height) if "progressive" in picture.info else picture.size
        held.enter_context(_budget.take(_count_bytes(decoded, source)))
        if picture is source:
            _load_alone(picture)
        upright = _to_rgb(picture)
        turn = _find_turn(picture)
        if turn is not None:
            upright = upright.transpose(turn)
        upright.info = {}  # otherwise the orientation stays there, and opening the result would turn it again
        return upright, (height, width) if turn in _ON_ITS_SIDE else (width, height)
    except ImageError:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise _unreadable(source, error, max_pixels) from error


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
        if hasattr(source, "read"):
            return _from_stream(BytesIO(_read_alone(source)), source)
        raise ImageError(
            f"expected a path, bytes, an open file, a PIL image or a uint8 array, got {type(source).__name__}"
        )
    if source == "-":
        return _from_stream(standard_input(), source)
    try:
        file = Path(os.fsdecode(source)).open("rb")  # noqa: SIM115
    except FileNotFoundError:
        if "://" in name(source):
            raise ImageError(f"{name(source)}: no file, and addresses are not opened. Fetch it first.") from None
        raise ImageError(f"{name(source)}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name(source)}: this is a folder. Name the image files in it.") from None
    except PermissionError:
        raise ImageError(f"{name(source)}: no permission to read this file.") from None
    except OSError as error:
        raise ImageError(f"{name(source)}: cannot read this file ({error.strerror or error}).") from error
    except ValueError:
        raise ImageError(f"{name(source)}: a name cannot contain a NUL character.") from None
    with file:
        return _from_stream(file, source)


def standard_input() -> BinaryIO:
    """Return the bytes of standard input as a stream.

    Raises:
        ImageError: if it is closed.
    """
    if sys.stdin is None:
        raise ImageError("standard input is closed. Redirect a file or a program to it.")
    return sys.stdin.buffer


_LOCKS = tuple(Lock() for _ in range(64))


def _load_alone(picture: Image.Image) -> None:
    """Let a PIL image read its file to the end: two threads that did so at once would mix its pixels up."""
    with _lock_of(picture):
        picture.load()
        with suppress(Exception):  # EXIF data are often damaged
            picture.getexif()


def _read_alone(file: BinaryFile) -> bytes:
    """Return the contents of an open file; two threads that read it at once would each get parts of them."""
    with _lock_of(file):
        with suppress(AttributeError, OSError, ValueError):  # a pipe, or a file that is closed
            file.seek(0)  # type: ignore[attr-defined]
        content = file.read(MAX_BYTES + 1)
    if not isinstance(content, bytes):
        raise ImageError(f"{name(file)}: a file of {type(content).__name__}. Open it as bytes: open(path, 'rb').")
    return content


def _lock_of(source: object) -> Lock:
    return _LOCKS[id(source) // 64 % len(_LOCKS)]


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(
            f"image array: expected uint8 values in 0..255, got {array.dtype}. Scale and convert the array."
        )
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or array.size == 0:
        raise ImageError(f"image array: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}.")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def _from_stream(stream: BinaryIO, source: Source) -> Image.Image:
    start = stream.read(HEAD_BYTES)
    plugin = _plugin(start, source)
    content = start + stream.read(MAX_BYTES)
    if len(content) > MAX_BYTES:
        raise _too_long(source)
    if plugin is PngImagePlugin.PngImageFile:
        content = _drop_chunks(content)
    return plugin(BytesIO(content))


_KEPT_CHUNKS = (
    b"tRNS",
    b"eXIf",
    b"tEXtRaw profile type exif\0",
    b"zTXtRaw profile type exif\0",
    b"iTXtXML:com.adobe.xmp\0",
)


def _drop_chunks(png: bytes) -> bytes:
    """Return a PNG file's critical chunks, and those for transparency and orientation whose checksums fit.

    Pillow refuses a file for any damaged chunk, while other programs show it without the chunks that are ancillary
    (Portable Network Graphics, third edition, chapter 13). What is left of an animation is its default picture.
    """
    view = memoryview(png)
    parts, start = [view[:8]], 8  # the signature
    while start < len(png):
        kind = png[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(view[start : start + 4])  # length, type, data, checksum
        if not kind[:1].islower() or (
            png.startswith(_KEPT_CHUNKS, start + 4)
            and zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end])
        ):
            parts.append(view[start:end])
        start = len(png) if kind == b"IEND" else end
    return b"".join(parts)


def _check_jpeg(picture: JpegImagePlugin.JpegImageFile, source: Source) -> JpegImagePlugin.JpegImageFile:
    """Return the picture of a JPEG file, not decoded yet, with the end marker if the file lacks only that.

    Raises:
        ImageTooLargeError: if decoding it would take too long.
    """
    content = cast(BytesIO, picture.fp).getvalue()
    scans, ended = _count_scans(content)
    scanned = scans * picture.width * picture.height
    if scanned > MAX_SCANNED:
        raise ImageTooLargeError(
            f"{name(source)}: {scans:,} scans of {picture.width} x {picture.height} pixels are too many "
            f"(limit: {MAX_SCANNED / 1e6:g} million pixels in all). Save the picture as a plain JPEG."
        )
    if ended or 3 * scanned > MAX_SCANNED or not _has_all_pixels(content, source):
        return picture
    return JpegImagePlugin.JpegImageFile(BytesIO(content + _END))


_END = b"\xff\xd9"
_ANY_BYTES = bytes(73 * number % 255 for number in range(1, 255))  # 1 to 254, as no 255 begins a marker


def _has_all_pixels(jpeg: bytes, source: Source) -> bool:
    """Return whether a JPEG file that lacks its end marker lacks nothing else.

    Decoders need the marker to know that no more is to come. If all pixels are there, they are the same whatever
    follows; if not, it is taken for those that are missing.
    """
    follows = (_ANY_BYTES, bytes(255 - value for value in _ANY_BYTES))  # from the first bit on, the opposite
    start = jpeg.rstrip(b"\xff")  # a half of the marker
    first, second = (JpegImagePlugin.JpegImageFile(BytesIO(start + bits + _END)) for bits in follows)
    with _budget.take(_count_bytes(first.size, source)):
        return ImageChops.difference(first, second).getbbox() is None


_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")  # but for those that nothing belongs to, except the end


def _count_scans(jpeg: bytes) -> tuple[int, bool]:
    """Return how often a JPEG file goes over its pixels, and whether it has an end marker.

    What follows the end, such as a video, does not count.
    """
    scans, place = 0, 2
    while marker := _MARKER.search(jpeg, place):
        place = marker.end()
        if marker[1] == b"\xd9":  # end of image
            return scans, True
        scans += marker[1] == b"\xda"  # start of scan
        place += int.from_bytes(jpeg[place : place + 2])  # the length of the segment
    return scans, False


def _check_size(picture: Image.Image, max_pixels: int, source: Source) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name(source)}: {width} x {height} pixels are too many "
            f"(limit: {max_pixels / 1e6:g} million). Make the picture smaller."
        )


def _count_bytes(size: tuple[int, int], source: Source) -> int:
    """Return what a picture counts towards `MAX_DECODED`."""
    width, height = size
    needed = PIXEL_BYTES * width * height
    if needed > _budget.amount:
        raise ImageTooLargeError(
            f"{name(source)}: {width} x {height} pixels need {needed / 1e9:.2f} GB of memory to decode "
            f"(limit: {_budget.amount / 1e9:.2f} GB). Make the picture smaller."
        )
    return needed


def _too_long(source: Source) -> ImageError:
    return ImageTooLargeError(
        f"{name(source)}: the file is too long (limit: {MAX_BYTES >> 20} MB). Make the picture smaller."
    )


_UNSUPPORTED = re.compile(r"unsupported|unknown pixel mode|unknown value|not available", re.IGNORECASE)
"""How Pillow's decoders call what they do not decode. Damage in a header may look the same."""


def _unreadable(source: Source, error: Exception, max_pixels: int = MAX_PIXELS) -> ImageError:
    """Return what to raise for an error of a decoder."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):  # of sizes that no header told
        pixels = re.search(r"\d+", reason)
        return ImageTooLargeError(
            f"{name(source)}: {f'{int(pixels[0]):,}' if pixels else 'so many'} pixels are too many "
            f"(limit: {max_pixels / 1e6:g} million). Make the picture smaller."
        )
    if reason.isdecimal():  # such as the number of a compression in a TIFF file, a KeyError
        reason = f"unknown value {reason} in its header"
    if _UNSUPPORTED.search(reason):
        return ImageError(
            f"{name(source)}: cannot read this image ({reason}). It is of a kind that Pillow does not decode, or "
            "damaged. Convert it to JPEG or PNG."
        )
    return ImageError(f"{name(source)}: cannot read this image ({reason}). Is the file complete and undamaged?")


HEAD_BYTES = 64
"""Bytes at the start of a file by which its format is recognised."""


def _plugin(start: bytes, source: Source) -> type[ImageFile.ImageFile]:
    """Choose Pillow's decoder by the first `HEAD_BYTES` bytes of a file.

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
        _silence_libtiff()
        return TiffImagePlugin.TiffImageFile
    brands = _brands(start)
    if _AVIF and brands & {b"avif", b"avis"}:
        return _AVIF
    kind = _name_format(start, brands)
    raise ImageError(f"{name(source)}: cannot read this image ({kind}). Convert it to JPEG or PNG.")


def _brands(start: bytes) -> set[bytes]:
    """Return the brands of a file of ISO base media (ISO/IEC 14496-12, 4.3): the major and the compatible ones."""
    if start[4:8] != b"ftyp":
        return set()
    box = start[: int.from_bytes(start[:4])]
    return {box[8:12], *(box[place : place + 4] for place in range(16, len(box), 4))}


def _name_format(start: bytes, brands: set[bytes]) -> str:
    """Return what to call a format that is not read."""
    if brands & {b"avif", b"avis"}:
        return "AVIF, which this installation of Pillow does not decode; Pillow 11.3 and later do"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return "HEIC, which is not supported; heif-convert, ImageMagick and the programs of the camera convert it"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JPEG XL, which is not supported"
    if start.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "JPEG 2000, which is not supported"
    return "unknown format"


@cache
def _silence_libtiff() -> None:
    """Keep libtiff from printing to the descriptor of standard error.

    Its messages name no file. What they report is either raised as an error that does, or harmless. Pillow has no
    setting for this, but its extension is linked with libtiff, whose handlers can be removed (TIFFError(3)). They
    belong to the process: nothing has to be restored, and threads do not interfere with each other.
    """
    from PIL import _imaging

    with suppress(OSError, AttributeError):  # where libtiff's functions are not exported, as on Windows
        library = ctypes.CDLL(_imaging.__file__)
        for set_handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Decode, and return a new RGB picture."""
    picture.load()
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return Image.fromarray(_to_eight_bits(picture)).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")  # the only mode that Pillow converts it to
    if picture.has_transparency_data:
        layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        opaque = Image.new("RGB", picture.size, "white")
        opaque.paste(layer, mask=layer)
        return opaque
    return picture.convert("RGB")


def _to_eight_bits(picture: Image.Image) -> np.ndarray:
    """Return the grey of a picture of more than 8 bits as uint8 (H, W).

    16 bits keep their upper 8. Files of 32-bit integers and of floating-point numbers do not say which value is
    white: they are scaled from the usual range that they fit in, or else from their own. The value that a PNG file
    makes transparent becomes white.
    """
    black, scale = 0.0, 1.0
    if picture.mode in ("I", "F"):
        ranges = [(float(values.min()), float(values.max())) for _, values in _strips(picture)]
        black, white = min(low for low, _ in ranges), max(high for _, high in ranges)
        if black >= 0:
            black, white = 0.0, next((usual for usual in (1.0, 255.0, 65535.0) if white <= usual), white)
        scale = 255 / max(white - black, 1e-30)
    grey = np.empty((picture.height, picture.width), np.uint8)
    transparent = picture.info.get("transparency")
    for rows, values in _strips(picture):
        grey[rows] = values >> 8 if values.dtype.kind == "u" else ((values - black) * scale).round()
        if transparent is not None:
            grey[rows][values == transparent] = 255
    return grey


def _strips(picture: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rows of a grey picture, about a million pixels at a time: the whole would need several copies."""
    step = max(1, (1 << 20) // picture.width)
    for top in range(0, picture.height, step):
        rows = slice(top, min(top + step, picture.height))
        values = np.asarray(picture.crop((0, rows.start, picture.width, rows.stop)))
        if picture.mode in ("I", "F"):
            values = np.nan_to_num(values.astype(np.float32), nan=0, posinf=0, neginf=0)
        yield rows, values


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
