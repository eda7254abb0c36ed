"""Read pictures: decode them safely and upright, resize and normalise them for the network.

The network's input comes with the rectangle of the picture that it shows, so that attention can be drawn over the
picture.
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

# Pillow logs some damage without the name of the file, which the errors below have. Python prints these records to
# standard error unless the program configures logging.
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
"""A path, "-" for standard input, the content of a file as bytes, an open binary file (read from its start if it is
seekable), a PIL image, a uint8 array: (H, W) or (H, W, 1) grey, (H, W, 3) RGB, (H, W, 4) RGBA; or a function that
returns the content of a file. For a path in bytes, pass `os.fsdecode(path)`."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | ({".avif"} if _AVIF else set())
)
"""Lower-case file suffixes of supported formats. AVIF is one of them if Pillow decodes it."""

OTHER_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jxl"}) - SUFFIXES
"""Lower-case file suffixes of unsupported formats of photographs."""

MAX_PIXELS = 128_000_000
"""Maximum number of pixels: more than the 108 megapixels of phones."""

MAX_BYTES = 1 << 29
"""Maximum file size: `MAX_PIXELS` of uncompressed RGBA."""

MAX_SCANNED = 20 * MAX_PIXELS
"""Maximum number of pixels of all scans of a JPEG together. Progressive files have about ten scans, but malicious
ones may have a hundred thousand, of a hundred bytes each."""

MAX_DECODED = 1 << 31
"""Maximum number of bytes for the pictures that all threads of the process decode at a time. Threads that would
exceed it wait, and a single picture that exceeds it is refused. One picture of `MAX_PIXELS` fits. The contents of
files, up to `MAX_BYTES` each, are not counted."""

PIXEL_BYTES = 16
"""Bytes of memory per pixel for `MAX_DECODED`: the maximum measured over all formats, for WebP. Pillow stores RGB
in 4, there are up to three copies at a time, and decoders have buffers."""


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
    """Return the picture upright, in RGB, completely decoded; of animations, the first frame.

    A JPEG file may lack its end marker if all pixels are there, and ancillary chunks of a PNG file may be damaged.
    Transparent parts become white. 16-bit, 32-bit and floating-point grey is scaled to 8 bits. A PIL image is not
    changed, and the result does not share its pixels.

    Args:
        source: the picture; files may be JPEG, PNG, WebP, GIF, BMP, TIFF or, if Pillow decodes it, AVIF.
        at_least: allows decoding a JPEG file at 1/2, 1/4 or 1/8 of its size, which is much faster, if both sides
            keep this many pixels.
        max_pixels: refuse larger pictures, before they are decoded.

    Raises:
        ImageError: if the picture cannot be read, is damaged or incomplete, has more than `max_pixels`, or needs
            more memory than `MAX_DECODED`.
    """
    with _opened(source, at_least, max_pixels) as (picture, _):
        return picture


def open_frame(
    source: Source, settings: ImageSettings, *, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, Rectangle, tuple[int, int]]:
    """Open and prepare a picture; return the result of `prepare`, and the width and height of the whole upright
    picture at full size.

    The picture counts towards `MAX_DECODED` until it is prepared, so many threads may call this at once.

    Raises:
        ImageError: as `open`.
    """
    with _opened(source, 2 * settings.size, max_pixels) as (picture, size):
        return *prepare(picture, settings), size


def read_size(path: str | os.PathLike[str] | Callable[[], bytes]) -> tuple[int, int]:
    """Return the width and height in a file's header, as stored, without decoding its pixels.

    Much faster than `open`, to scan many files; damage after the header is not detected. Instead of a path, a
    function may return the content.

    Raises:
        ImageError: if the header cannot be read, or the picture is too large for `open`.
    """
    try:
        if callable(path):
            picture = _picture(path)
        else:
            with Path(path).open("rb") as stream:
                plugin = _plugin(stream.read(HEAD_BYTES), path)
                if os.fstat(stream.fileno()).st_size > MAX_BYTES:  # the decoder of WebP reads the whole file
                    raise _too_large(path, "the file is too long", f"{MAX_BYTES >> 20} MB")
                stream.seek(0)
                try:
                    picture = plugin(stream)
                except Exception:  # `open` may repair it
                    picture = _picture(path)
        _check_size(picture, MAX_PIXELS, path)
        return picture.size
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def prepare(picture: Image.Image, settings: ImageSettings) -> tuple[np.ndarray, Rectangle]:
    """Return the network's input, float32 (3, size, size), normalised, and the part of the picture that it shows.

    Args:
        picture: an RGB picture from `open`.
        settings: size and kind of the frame, and the normalisation.
    """
    size = settings.size
    width, height = picture.size
    box = (0, 0, width, height)  # the used part of the picture in pixels
    columns, rows, x, y = size, size, 0, 0  # size and position in the frame
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

    # reducing_gap resizes by integer factors first: faster, and a picture of 1 x 1,000,000 pixels needs no memory.
    resized = picture.resize((columns, rows), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    mean, std = (255 * np.array(values, np.float32) for values in (settings.mean, settings.std))
    frame = np.zeros((3, size, size), np.float32)  # zero is the mean colour
    pixels = (np.asarray(resized, np.float32) - mean) / std  # (rows, columns, 3)
    frame[:, y : y + rows, x : x + columns] = pixels.transpose(2, 0, 1)
    return frame, shown


def name(source: Source) -> str:
    """Return the name of a source for messages: its path, "standard input", "image bytes"..."""
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
    """Return whether a value is a `Source`, a single picture and not an iterable of pictures."""
    return (
        isinstance(value, (str, os.PathLike, bytes, Image.Image, np.ndarray))
        or callable(value)
        or hasattr(value, "read")
    )


def is_image_path(path: str | os.PathLike[str]) -> bool:
    """Return whether scans of folders include this file: it has a supported suffix and is not hidden."""
    path = Path(path)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def is_or_names_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a picture by its suffix or its first bytes, and must not be overwritten."""
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
    """An amount shared by threads. Threads that need more than is left wait, first come, first served."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.reset()

    def reset(self) -> None:
        """Release everything."""
        self._used = 0
        self._turn = Lock()
        self._returned = Condition()

    @contextmanager
    def take(self, part: int) -> Iterator[None]:
        """Take a part of the amount in the context. A thread must not take two parts."""
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
if hasattr(os, "register_at_fork"):  # a child process does not have the threads that would release their parts
    os.register_at_fork(after_in_child=_budget.reset)


@contextmanager
def _opened(source: Source, at_least: int | None, max_pixels: int) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Yield the picture and its full size. Until the context ends, it counts towards `MAX_DECODED`."""
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
        # The decoder of a progressive JPEG stores the coefficients of the whole picture.
        decoded = (width, height) if "progressive" in picture.info else picture.size
        held.enter_context(_budget.take(_count_bytes(decoded, source)))
        if picture is source:
            _load_locked(picture)
        upright = _to_rgb(picture)
        transpose = _find_transpose(picture)
        if transpose is not None:
            upright = upright.transpose(transpose)
        upright.info = {}  # otherwise opening the result would rotate it again
        return upright, (height, width) if transpose in _SWAPS_SIDES else (width, height)
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types of exceptions for damaged files
        raise _unreadable(source, error, max_pixels) from error


def _picture(source: Source) -> Image.Image:
    """Return the picture with its header read; its pixels are decoded later, if possible."""
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
            return _from_stream(BytesIO(_read_locked(source)), source)
        advice = ""
        if hasattr(source, "__array__"):  # a tensor of PyTorch, JAX or TensorFlow
            advice = (
                ". Its layout and range are not known; convert it to (H, W, 3), such as "
                "(255 * tensor).byte().permute(1, 2, 0).cpu().numpy()"
            )
        raise ImageError(
            "expected a path, bytes, an open file, a PIL image or a uint8 array of NumPy, "
            f"got {type(source).__name__}{advice}"
        )
    if source == "-":
        return _from_stream(standard_input(), source)
    try:
        file = Path(os.fsdecode(source)).open("rb")  # noqa: SIM115
    except FileNotFoundError:
        if "://" in name(source):
            raise ImageError(f"{name(source)}: no such file, and URLs are not opened. Download it first.") from None
        raise ImageError(f"{name(source)}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name(source)}: this is a folder. Name the image files in it.") from None
    except PermissionError:
        raise ImageError(f"{name(source)}: no permission to read this file.") from None
    except OSError as error:
        raise ImageError(f"{name(source)}: cannot read this file ({error.strerror or error}).") from error
    except ValueError:
        raise ImageError(f"{name(source)}: a path cannot contain a NUL character.") from None
    with file:
        return _from_stream(file, source)


def standard_input() -> BinaryIO:
    """Return standard input as a binary stream.

    Raises:
        ImageError: if it is closed.
    """
    if sys.stdin is None:
        raise ImageError("standard input is closed. Redirect a file or a program to it.")
    return sys.stdin.buffer


_LOCKS = tuple(Lock() for _ in range(64))


def _load_locked(picture: Image.Image) -> None:
    """Load a PIL image under a lock: loading is not thread-safe."""
    with _lock_of(picture):
        picture.load()
        with suppress(Exception):  # EXIF data are often damaged
            picture.getexif()


def _read_locked(file: BinaryFile) -> bytes:
    """Return the content of an open file, read under a lock."""
    with _lock_of(file):
        with suppress(AttributeError, OSError, ValueError):  # a pipe, or a closed file
            file.seek(0)  # type: ignore[attr-defined]
        content = file.read(MAX_BYTES + 1)
    if not isinstance(content, bytes):
        raise ImageError(
            f"{name(file)}: the file returns {type(content).__name__}. Open it in binary mode: open(path, 'rb')."
        )
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
        raise _too_large(source, "the file is too long", f"{MAX_BYTES >> 20} MB")
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
    """Return a PNG file with its critical chunks, and the chunks for transparency and orientation with valid
    checksums.

    Pillow refuses files with any damaged chunk; other programs ignore damaged ancillary chunks (Portable Network
    Graphics, third edition, chapter 13). Of an animation, the default picture remains.
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
    """Return the picture of a JPEG file, not decoded yet, with an end marker if nothing else is missing."""
    content = cast(BytesIO, picture.fp).getvalue()
    scans, has_end = _count_scans(content)
    scanned = scans * picture.width * picture.height
    if scanned > MAX_SCANNED:
        raise ImageTooLargeError(
            f"{name(source)}: {scans:,} scans of {picture.width} x {picture.height} pixels are too many "
            f"(limit: {MAX_SCANNED / 1e6:g} million pixels in total). Save the picture as a baseline JPEG."
        )
    if has_end or 3 * scanned > MAX_SCANNED or not _has_all_pixels(content, source):
        return picture
    return JpegImagePlugin.JpegImageFile(BytesIO(content + _END))


_END = b"\xff\xd9"
_ANY_BYTES = bytes(73 * number % 255 for number in range(1, 255))  # 1 to 254: 255 starts a marker


def _has_all_pixels(jpeg: bytes, source: Source) -> bool:
    """Return whether a JPEG file without an end marker has all pixels.

    If it has, they do not depend on appended bytes; otherwise these are decoded as the missing pixels.
    """
    suffixes = (_ANY_BYTES, bytes(255 - value for value in _ANY_BYTES))  # different from the first bit on
    content = jpeg.rstrip(b"\xff")  # the first half of the marker
    first, second = (JpegImagePlugin.JpegImageFile(BytesIO(content + suffix + _END)) for suffix in suffixes)
    with _budget.take(_count_bytes(first.size, source)):
        return ImageChops.difference(first, second).getbbox() is None


_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")  # without markers that have no segment, except the end


def _count_scans(jpeg: bytes) -> tuple[int, bool]:
    """Return the number of scans of a JPEG file up to its end marker, and whether it has one."""
    scans, position = 0, 2
    while marker := _MARKER.search(jpeg, position):
        position = marker.end()
        if marker[1] == b"\xd9":  # end of image
            return scans, True
        scans += marker[1] == b"\xda"  # start of scan
        position += int.from_bytes(jpeg[position : position + 2])  # length of the segment
    return scans, False


def _check_size(picture: Image.Image, max_pixels: int, source: Source) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise _too_large(source, f"{width} x {height} pixels are too many", f"{max_pixels / 1e6:g} million")


def _count_bytes(size: tuple[int, int], source: Source) -> int:
    """Return the number of bytes of a picture for `MAX_DECODED`."""
    width, height = size
    needed = PIXEL_BYTES * width * height
    if needed > _budget.amount:
        problem = f"{width} x {height} pixels need {needed / 1e9:.2f} GB of memory to decode"
        raise _too_large(source, problem, f"{_budget.amount / 1e9:.2f} GB")
    return needed


def _too_large(source: Source, problem: str, limit: str) -> ImageError:
    return ImageTooLargeError(f"{name(source)}: {problem} (limit: {limit}). Make the picture smaller.")


_UNSUPPORTED = re.compile(r"unsupported|unknown pixel mode|unknown value|not available", re.IGNORECASE)
"""Messages of Pillow's decoders for unsupported variants. Damaged headers may cause the same messages."""


def _unreadable(source: Source, error: Exception, max_pixels: int = MAX_PIXELS) -> ImageError:
    """Return the error for an exception of a decoder."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):  # of sizes that are not in the header
        pixels = re.search(r"\d+", reason)
        problem = f"{int(pixels[0]):,} pixels are too many" if pixels else "too many pixels"
        return _too_large(source, problem, f"{max_pixels / 1e6:g} million")
    if reason.isdecimal():  # a KeyError, such as the number of a compression in a TIFF file
        reason = f"unknown value {reason} in its header"
    if _UNSUPPORTED.search(reason):
        return ImageError(
            f"{name(source)}: cannot read this image ({reason}). Pillow does not support this variant, or the "
            "file is damaged. Convert it to JPEG or PNG."
        )
    return ImageError(f"{name(source)}: cannot read this image ({reason}). The file may be incomplete or damaged.")


HEAD_BYTES = 64
"""Number of bytes at the start of a file by which its format is detected."""


def _plugin(start: bytes, source: Source) -> type[ImageFile.ImageFile]:
    """Return Pillow's decoder for the first `HEAD_BYTES` bytes of a file.

    Not `Image.open`, which has a global limit of the size.
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


def _brands(head: bytes) -> set[bytes]:
    """Return the major and compatible brands of an ISO base media file (ISO/IEC 14496-12, 4.3)."""
    if head[4:8] != b"ftyp":
        return set()
    box = head[: int.from_bytes(head[:4])]
    return {box[8:12], *(box[start : start + 4] for start in range(16, len(box), 4))}


def _name_format(start: bytes, brands: set[bytes]) -> str:
    """Return the name of an unsupported format, with advice."""
    if brands & {b"avif", b"avis"}:
        return "AVIF, which this installation of Pillow does not decode; Pillow 11.3 and later do"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return "HEIC, which is not supported; heif-convert, ImageMagick and the camera software convert it"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JPEG XL, which is not supported"
    if start.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "JPEG 2000, which is not supported"
    return "unknown format"


@cache
def _silence_libtiff() -> None:
    """Prevent libtiff from printing to standard error.

    Its messages do not have the name of the file; errors are also raised, and the rest is harmless. Pillow has no
    setting for this, but its extension is linked with libtiff, whose global handlers can be removed (TIFFError(3)).
    """
    from PIL import _imaging

    with suppress(OSError, AttributeError):  # on Windows, libtiff's functions are not exported
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
        picture = picture.convert("LA")  # the only supported conversion
    if picture.has_transparency_data:
        layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        opaque = Image.new("RGB", picture.size, "white")
        opaque.paste(layer, mask=layer)
        return opaque
    return picture.convert("RGB")


def _to_eight_bits(picture: Image.Image) -> np.ndarray:
    """Return a grey picture of more than 8 bits as uint8 (H, W).

    16 bits are truncated to the upper 8. 32-bit integers and floating-point numbers have no defined white: they are
    scaled from the smallest usual range that contains them, or from their own. A transparent value becomes white.
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
    """Yield rows of a grey picture, about a million pixels at a time, to save memory."""
    step = max(1, (1 << 20) // picture.width)
    for top in range(0, picture.height, step):
        rows = slice(top, min(top + step, picture.height))
        values = np.asarray(picture.crop((0, rows.start, picture.width, rows.stop)))
        if picture.mode in ("I", "F"):
            values = np.nan_to_num(values.astype(np.float32), nan=0, posinf=0, neginf=0)
        yield rows, values


_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {_TRANSPOSES[orientation] for orientation in (5, 6, 7, 8)}


def _find_transpose(picture: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes a picture upright, by its EXIF data."""
    try:
        return _TRANSPOSES.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF data are often damaged; a rotated picture is better than none
        return None
