import contextlib
import io
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, PngImagePlugin, features

from captioner import images
from captioner.config import from_dict
from captioner.errors import ConfigError, ImageError, ImageTooLargeError
from captioner.images import ImageSettings

LOSSLESS = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "gif": {"format": "GIF"},
    "bmp": {"format": "BMP"},
    "tiff": {"format": "TIFF"},
    "tiff-deflate": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
}
FORMATS = {"jpeg": {"format": "JPEG", "quality": 95}, **LOSSLESS}


def encode(picture: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, **options)
    return stream.getvalue()


def scene(width: int, height: int) -> Image.Image:
    """Smooth, coloured, different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def failure(source: images.Source, **options) -> str:
    with pytest.raises(ImageError) as caught:
        images.open(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What can be opened


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_every_format_opens_from_path_and_bytes(tmp_path, options):
    picture = Image.new("RGB", (40, 30), (200, 30, 90))
    content = encode(picture, **options)
    path = tmp_path / "any-name.jpg"  # the content counts, not the suffix
    path.write_bytes(content)
    for source in (content, path, str(path)):
        opened = images.open(source)
        assert (opened.mode, opened.size) == ("RGB", (40, 30))
        assert abs(pixels(opened) - pixels(picture)).max() <= 2


def test_minus_reads_standard_input(monkeypatch):
    content = encode(Image.new("RGB", (4, 3), "red"), format="PNG")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    assert images.open("-").getpixel((0, 0)) == (255, 0, 0)


avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")


@avif
def test_avif_is_opened_upright_within_the_limits(tmp_path):
    path = tmp_path / "photo.avif"
    scene(64, 48).save(path, "AVIF", quality=95)
    for source in (path, path.read_bytes()):
        assert abs(pixels(images.open(source)) - pixels(scene(64, 48))).mean() < 3
    assert images.read_size(path) == (64, 48)
    assert "64 x 48 pixels are too many" in failure(path, max_pixels=64 * 48 - 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    scene(64, 48).save(path, "AVIF", exif=exif)
    assert images.open(path).size == (48, 64)
    path.write_bytes(path.read_bytes()[:-200])
    assert "cannot read this image" in failure(path)


def test_folders_include_avif_if_it_is_supported():
    assert images.is_image_path("photo.avif") == features.check("avif") == (".avif" not in images.OTHER_SUFFIXES)


def damaged_tiffs() -> list[bytes]:
    """TIFF files with damaged data, which libtiff reports on standard error, and with a damaged directory."""
    contents = []
    for compression in ("group4", "tiff_lzw", "jpeg", "tiff_deflate", "packbits"):
        noise = Image.effect_noise((64, 64), 80)
        content = bytearray(
            encode(noise.convert("1" if compression == "group4" else "RGB"), format="TIFF", compression=compression)
        )
        contents.append(bytes(content[: len(content) * 2 // 3]))
        for index in range(60, 100):
            content[index] ^= 0x5A
        contents.append(bytes(content))
    return contents


def test_decoders_print_nothing(tmp_path):
    paths = [tmp_path / f"{number}.tif" for number in range(10)]
    for path, content in zip(paths, damaged_tiffs(), strict=True):
        path.write_bytes(content)
    code = (
        "import logging, sys, warnings\nfrom captioner import images\nfrom captioner.errors import ImageError\n"
        "warnings.simplefilter('ignore')\n"
        "for path in sys.argv[1:]:\n    try: images.open(path)\n    except ImageError: print(path)\n"
        "logging.getLogger('PIL.TiffImagePlugin').error('a note of Pillow')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert len(ran.stdout.splitlines()) >= 5
    assert ran.stderr == ""


# The stored rows and columns of an upright picture, from the EXIF standard's table: where row 0 and column 0 lie.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "tiff-deflate"])
def test_exif_orientation_is_applied(kind, orientation):
    upright = pixels(scene(48, 32)).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encode(Image.fromarray(STORED[orientation](upright).copy()), exif=exif, **FORMATS[kind])
    opened = images.open(content)
    assert opened.size == (48, 32)
    assert abs(pixels(opened) - upright).mean() < 3
    assert np.array_equal(pixels(images.open(opened)), pixels(opened))  # and it is not undone twice
    assert np.array_equal(pixels(images.open(Image.open(io.BytesIO(content)))), pixels(opened))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_are_ignored():
    content = encode(scene(48, 32), format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert images.open(content).size == (48, 32)


def half_transparent(mode: str) -> Image.Image:
    """Left half black, right half transparent."""
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (4, 0, 8, 8))
    return picture.convert(mode)


def transparent_palette() -> Image.Image:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.paste(0, (4, 0, 8, 8))
    return picture


TRANSPARENT = {
    "rgba": encode(half_transparent("RGBA"), format="PNG"),
    "la": encode(half_transparent("LA"), format="PNG"),
    "webp": encode(half_transparent("RGBA"), format="WEBP", lossless=True),
    "tiff": encode(half_transparent("RGBA"), format="TIFF"),
    "palette": encode(transparent_palette(), format="PNG", transparency=0),
    "palette-alpha": encode(transparent_palette(), format="PNG", transparency=b"\x00\xff"),
    "gif": encode(transparent_palette(), format="GIF", transparency=0),
    "grey-key": encode(Image.fromarray(np.tile(np.uint8([0, 9]).repeat(4), (8, 1))), format="PNG", transparency=9),
    "pil-rgba": half_transparent("RGBA"),
    "pil-rgba-premultiplied": half_transparent("RGBa"),
    "pil-la": half_transparent("LA"),
    "array": np.asarray(half_transparent("RGBA")),
}


@pytest.mark.parametrize("source", TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparent_parts_become_white(source):
    opened = images.open(source)
    assert opened.getpixel((1, 1)) == (0, 0, 0)
    assert opened.getpixel((6, 6)) == (255, 255, 255)


@pytest.mark.parametrize("levels", [(0, 256, 515, 65535), (515,)])
def test_the_transparent_value_of_a_grey_png_of_16_bits_becomes_white(levels):
    grey = np.array([levels], np.uint16)
    content = with_chunk(encode(Image.fromarray(grey), format="PNG"), chunk(b"tRNS", struct.pack(">H", 515)))
    expected = [[[255] * 3 if level == 515 else [level >> 8] * 3 for level in levels]]
    assert pixels(images.open(content)).tolist() == expected


def test_a_pil_image_of_grey_multiplied_by_transparency_opens():
    picture = Image.merge("LA", (Image.new("L", (4, 3), 100), Image.new("L", (4, 3), 51)))
    expected = pixels(images.open(picture))  # 0.2 * 100 + 0.8 * 255 = 224
    assert set(expected.flat) == {224}
    assert abs(pixels(images.open(picture.convert("La"))) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_deep_grey_of_many_pixels_is_scaled_as_a_whole(kind):
    ramp = np.linspace(0, 65535, 1500).astype(kind)
    content = encode(Image.fromarray(np.repeat(ramp[:, None], 1500, axis=1)), format="TIFF")
    opened = pixels(images.open(content))  # more than a million pixels, so of several strips
    assert abs(opened[..., 0] - ramp[:, None] / 257).max() <= 1


def test_half_transparent_red_over_white_is_pink():
    red, green, blue = images.open(Image.new("RGBA", (2, 2), (255, 0, 0, 128))).getpixel((0, 0))
    assert (red, green, blue) == (255, 127, 127)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *itertools.product(("PIL",), ("1", "L", "P", "RGB", "CMYK", "YCbCr")),
        *itertools.product(("TIFF",), ("1", "L", "P", "RGB", "CMYK")),
        *itertools.product(("JPEG",), ("L", "RGB", "CMYK")),  # Adobe's inverted CMYK, which Pillow writes
        *itertools.product(("PNG",), ("1", "L", "P", "RGB")),
    ],
)
def test_colours_survive_every_colour_space(kind, mode):
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste("black" if mode in ("1", "L") else "red", (8, 0, 16, 16))
    source = picture.convert(mode) if kind == "PIL" else encode(picture.convert(mode), format=kind)
    opened = pixels(images.open(source))
    assert abs(opened[4, 2] - [255, 255, 255]).max() <= 3
    assert abs(opened[4, 13] - ([0, 0, 0] if mode in ("1", "L") else [255, 0, 0])).max() <= 3


RAMP = np.linspace(0, 1, 256)[None].repeat(4, axis=0)


DEEP = {
    "png-16": encode(Image.fromarray((RAMP * 65535).astype(np.uint16)), format="PNG"),
    "tiff-16": encode(Image.fromarray((RAMP * 65535).astype(np.uint16)), format="TIFF"),
    "tiff-32-as-16": encode(Image.fromarray((RAMP * 65535).astype(np.int32)), format="TIFF"),
    "tiff-32": encode(Image.fromarray((RAMP * 2e9).astype(np.int32)), format="TIFF"),
    "tiff-signed": encode(Image.fromarray((RAMP * 2000 - 1000).astype(np.int32)), format="TIFF"),
    "float-to-1": encode(Image.fromarray(RAMP.astype(np.float32)), format="TIFF"),
    "float-to-255": encode(Image.fromarray((RAMP * 255).astype(np.float32)), format="TIFF"),
    "float-narrow": encode(Image.fromarray((RAMP * 1e-3 - 1).astype(np.float32)), format="TIFF"),
    "pil-big-endian": Image.frombytes("I;16B", (256, 4), (RAMP * 65535).astype(">u2").tobytes()),
    "pil-32-as-8": Image.fromarray((RAMP * 255).astype(np.int32)),
}


@pytest.mark.parametrize("source", DEEP.values(), ids=DEEP)
def test_deep_grey_is_scaled_to_eight_bits(source):
    assert abs(pixels(images.open(source)) - (255 * RAMP)[..., None]).max() <= 1.5


def test_nan_and_infinity_do_not_affect_the_scale():
    grey = RAMP.astype(np.float32)
    grey[0, 0], grey[0, 1], grey[0, 2] = np.nan, np.inf, -np.inf
    assert abs(pixels(images.open(Image.fromarray(grey)))[1:] - (255 * RAMP[1:])[..., None]).max() <= 1


@pytest.mark.parametrize("value", [0, 7])
def test_a_flat_floating_point_picture_opens(value):
    assert images.open(Image.new("F", (4, 4), value)).getpixel((0, 0)) == (value, value, value)


def test_the_first_frame_of_an_animation_is_used():
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        content = encode(first, format=kind, save_all=True, append_images=[second])
        red, _, blue = images.open(content).getpixel((5, 5))
        assert (red > 250, blue < 5) == (True, True)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (3, 5, 4)])
def test_arrays_open(shape):
    array = np.full(shape, 255, np.uint8)
    array[0, 0, ...] = 0
    array[..., -1:] = 255 if shape[-1] == 4 else array[..., -1:]
    opened = images.open(array)
    assert (opened.mode, opened.size) == ("RGB", (5, 3))
    assert opened.getpixel((0, 0)) == (0, 0, 0)
    assert opened.getpixel((4, 2)) == (255, 255, 255)


def test_an_array_may_be_a_view():
    array = pixels(scene(20, 10)).astype(np.uint8)
    assert np.array_equal(pixels(images.open(array[::-2, ::-1])), array[::-2, ::-1])


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((4, 4, 3), np.float32), "expected uint8 values in 0..255, got float32"),
        (np.zeros((4, 4), bool), "expected uint8 values in 0..255, got bool"),
        (np.zeros((3, 4, 5), np.uint8), r"got (3, 4, 5)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got (1, 4, 4, 3)"),
        (np.zeros(4, np.uint8), r"got (4,)"),
        (np.zeros((0, 4), np.uint8), r"got (0, 4)"),
    ],
)
def test_other_arrays_are_refused(array, problem):
    message = failure(array)
    assert message.startswith("image array: expected")
    assert problem in message


def test_a_given_pil_image_is_neither_changed_nor_closed_nor_shared():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for given in (
        scene(20, 10),
        Image.open(io.BytesIO(encode(scene(1000, 800), format="JPEG", exif=exif))),
        Image.open(io.BytesIO(encode(scene(20, 10), format="GIF", save_all=True, append_images=[scene(20, 10)]))),
    ):
        expected = given.copy()
        opened = images.open(given, at_least=10)
        opened.paste("black", (0, 0, *opened.size))
        assert (given.mode, given.size, given.info) == (expected.mode, expected.size, expected.info)
        assert np.array_equal(pixels(given), pixels(expected))
        assert given.getexif() == expected.getexif()


# What is refused


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    """A PNG chunk, whose checksum is changed by `damage`."""
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixel_data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel_data) + chunk(b"IEND", b"")


def test_a_huge_picture_is_refused_from_its_header(monkeypatch):
    def load(_):
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ImageTooLargeError) as caught:
        images.open(png_header(20_000, 20_000))
    expected = "image bytes: 20000 x 20000 pixels are too many (limit: 128 million). Make the picture smaller."
    assert str(caught.value) == expected


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_the_limit_of_pixels_applies_to_every_format(options):
    content = encode(scene(40, 30), **options)
    assert images.open(content, max_pixels=1200).size == (40, 30)
    assert "40 x 30 pixels are too many" in failure(content, max_pixels=1199)
    assert "40 x 30 pixels are too many" in failure(scene(40, 30), max_pixels=1199)


def test_a_photograph_of_96_megapixels_opens_without_a_warning():
    content = encode(Image.new("L", (12_000, 8_000), 77), format="JPEG")
    assert images.open(content, at_least=448).getpixel((0, 0)) == (77, 77, 77)


def progressive(size: tuple[int, int], more_scans: int, between: bytes = b"") -> bytes:
    """A JPEG file whose last scan, and the tables before it, come again and again."""
    content = encode(Image.new("RGB", size, "teal"), format="JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xc4", 0, content.rindex(b"\xff\xda")) : -2]
    return content[:-2] + more_scans * (between + scan) + content[-2:]


# What comes between is skipped by decoders: fill bytes, a marker that nothing belongs to, a comment.
@pytest.mark.parametrize("between", [b"", b"\xff\xff", b"\xff\x01", b"\xff\xfe\0\4\xff\xda"])
def test_a_jpeg_with_too_many_scans_is_refused(monkeypatch, between):
    assert images.open(progressive((400, 300), 40, between)).size == (400, 300)
    monkeypatch.setattr(images, "MAX_SCANNED", 50 * 400 * 300)  # the file has ten scans of its own
    assert images.open(progressive((400, 300), 40, between)).size == (400, 300)
    message = failure(progressive((400, 300), 41, between))
    assert message.startswith("image bytes: 51 scans of 400 x 300 pixels are too many")


def test_data_after_the_end_of_a_jpeg_are_ignored(monkeypatch):
    monkeypatch.setattr(images, "MAX_SCANNED", 10 * 80 * 60)
    assert images.open(progressive((80, 60), 0) + 100 * b"a video\xff\xda").size == (80, 60)


def test_a_picture_decoded_at_a_fraction_keeps_its_size_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    content = encode(scene(801, 601), format="JPEG", exif=exif)
    assert images.open(content, at_least=200).size == (301, 401)
    settings = images.ImageSettings(size=100)  # decoded at least at twice this size
    assert images.open_frame(content, settings)[2] == (601, 801)
    assert images.open_frame(scene(40, 30), settings)[2] == (40, 30)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_the_limit_of_pillow_has_no_effect(monkeypatch, kind):
    content = encode(scene(40, 30), **FORMATS[kind])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow would warn, and warnings are errors here
    assert images.open(content).size == (40, 30)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.03, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise), **FORMATS[kind])
    path = tmp_path / "cut.jpg"
    path.write_bytes(content[: int(len(content) * part)])
    message = failure(path)
    assert message.startswith(f"{path}: cannot read this image (")
    assert message.endswith("The file may be incomplete or damaged.")


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("at_least", [None, 50])
def test_a_truncated_progressive_jpeg_is_refused(part, at_least):
    content = encode(scene(400, 300), format="JPEG", progressive=True, quality=95)
    assert "cannot read this image" in failure(content[: int(len(content) * part)], at_least=at_least)


NOT_OURS = {
    "text": b"just some text, saved as .jpg",
    "one-byte": b"x",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "ppm": encode(Image.new("RGB", (8, 8)), format="PPM"),
    "ico": encode(Image.new("RGB", (8, 8)), format="ICO"),
}


@pytest.mark.parametrize("content", NOT_OURS.values(), ids=NOT_OURS)
def test_other_formats_are_refused_with_advice(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    assert failure(path) == f"{path}: cannot read this image (unknown format). Convert it to JPEG or PNG."


def box(*brands: bytes) -> bytes:
    """The first box of a file of ISO base media, of a major brand and compatible ones."""
    return (
        struct.pack(">I4s4sI", 16 + 4 * len(brands[1:]), b"ftyp", brands[0], 0) + b"".join(brands[1:]) + b"\0" * 50
    )


KNOWN = {
    "HEIC": [box(b"heic", b"mif1", b"heic"), box(b"mif1", b"mif1", b"heic"), box(b"msf1", b"hevc")],
    "JPEG XL": [b"\xff\x0a\xfa\x7f", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "],
    "JPEG 2000": [b"\xff\x4f\xff\x51\0\x2f", b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 "],
}


@pytest.mark.parametrize(
    ("kind", "content"), [(kind, item) for kind, contents in KNOWN.items() for item in contents]
)
def test_an_unsupported_format_is_named_with_advice(kind, content):
    message = failure(content)
    assert message.startswith(f"image bytes: cannot read this image ({kind}, which is not supported")
    assert message.endswith("). Convert it to JPEG or PNG.")


def test_avif_is_named_where_pillow_does_not_decode_it(monkeypatch):
    monkeypatch.setattr(images, "_AVIF", None)
    for content in (box(b"avif", b"mif1"), box(b"mif1", b"avif"), box(b"avis")):
        assert "cannot read this image (AVIF, which this installation of Pillow does not decode" in failure(content)


def test_a_file_without_read_permission_is_refused(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    assert failure("secret.jpg") == "secret.jpg: no permission to read this file."


def test_what_is_no_file_of_a_picture_is_refused(tmp_path):
    (tmp_path / "empty.jpg").touch()
    for source in (tmp_path / "empty.jpg", b""):
        assert failure(source).startswith(f"{images.name(source)}: the file is empty")
    assert failure(tmp_path / "none.jpg") == f"{tmp_path / 'none.jpg'}: no such file. Check the path."
    assert failure(tmp_path) == f"{tmp_path}: this is a folder. Name the image files in it."
    assert failure("a\0b.jpg") == "a\0b.jpg: a path cannot contain a NUL character."
    assert failure("x" * 300) == f"{'x' * 300}: cannot read this file (File name too long)."


def test_a_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert failure("-") == "standard input is closed. Redirect a file or a program to it."


@pytest.mark.parametrize("source", [None, 3, ["a.jpg"], object()])
def test_other_types_are_refused(source):
    assert failure(source) == (
        f"expected a path, bytes, an open file, a PIL image or a uint8 array of NumPy, got {type(source).__name__}"
    )


def test_a_tensor_is_refused_with_the_conversion_that_works():
    tensor = torch.linspace(0, 1, 3 * 40 * 30).reshape(3, 40, 30)
    message = failure(tensor)
    conversion = message.partition("such as ")[2]
    array = eval(conversion, {"tensor": tensor})
    assert "got Tensor" in message
    assert images.open(array).size == (30, 40)


def test_a_large_file_is_refused_before_it_is_read(monkeypatch, tmp_path):
    path = tmp_path / "long.png"
    path.write_bytes(encode(scene(40, 30), format="PNG") + b"\0" * (3 << 20))
    assert images.open(path).size == (40, 30)
    monkeypatch.setattr(images, "MAX_BYTES", 2 << 20)
    assert failure(path) == f"{path}: the file is too long (limit: 2 MB). Make the picture smaller."


@pytest.mark.parametrize(
    "error",
    [
        SyntaxError("broken\nfile"),
        struct.error("unpack"),
        OverflowError(),
        zlib.error("-3"),
        MemoryError(),
        RecursionError(),
        UserWarning("odd"),
    ],
)
def test_every_exception_of_a_decoder_becomes_one_line(monkeypatch, error):
    def load(_):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    message = failure(encode(scene(4, 3), format="PNG"))
    reason = " ".join(str(error).split()) or type(error).__name__
    assert message.startswith(f"image bytes: cannot read this image ({reason}).")


def bmp(bits, compression):
    """A BMP file of 8 x 8 pixels and 64 bytes of masks, palette and whatever else stands before them."""
    content = bytes(64 + 8 * 8 * 4)
    about = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, bits, compression, len(content), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(content), 0, 0, 54 + 64) + about + content


def tiff(samples, bits, kind, compression=1):
    """A TIFF file of 4 x 4 pixels: tags of 4 bytes each, then what needs more, then the pixels."""
    several = [bits] * samples + [kind] * samples
    tags = {
        256: 4,
        257: 4,
        258: (8, samples),
        259: compression,
        262: 2 if samples == 3 else 1,
        273: 0,
        277: samples,
    }
    tags |= {278: 4, 279: 2 * samples * bits, 339: (8 + 2 * samples, samples)}
    after = 8 + 2 + 12 * len(tags) + 4
    tags[273] = after + 2 * len(several)
    entries = b""
    for tag, value in tags.items():
        if not isinstance(value, tuple):
            entries += struct.pack("<HHII", tag, 4, 1, value)
        elif samples == 1:
            entries += struct.pack("<HHIHH", tag, 3, 1, bits if tag == 258 else kind, 0)
        else:
            entries += struct.pack("<HHII", tag, 3, samples, after - 8 + value[0])
    pixels = bytes(2 * samples * bits)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + bytes(4) + struct.pack(f"<{len(several)}H", *several) + pixels


def test_kinds_of_bmp_and_tiff_that_are_decoded():
    """As do all that are whole, so that those below are refused for nothing but their kind."""
    assert images.open(bmp(24, 0)).size == (8, 8)
    assert images.open(tiff(3, 8, 1)).size == images.open(tiff(1, 32, 3)).size == (4, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bmp(2, 0), "Unsupported BMP pixel depth (2)"),
        (bmp(64, 0), "Unsupported BMP pixel depth (64)"),
        (bmp(24, 4), "Unsupported BMP compression (4)"),
        (bmp(16, 3), "Unsupported BMP bitfields layout"),
        (tiff(3, 32, 3), "unknown pixel mode"),
        (tiff(3, 16, 3), "unknown pixel mode"),
        (tiff(1, 64, 3), "unknown pixel mode"),
        (tiff(3, 8, 1, compression=34712), "unknown value 34712 in its header"),
    ],
)
def test_an_unsupported_variant_is_reported(content, reason):
    assert failure(content) == (
        f"image bytes: cannot read this image ({reason}). Pillow does not support this variant, or "
        "the file is damaged. Convert it to JPEG or PNG."
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_gif_with_a_frame_larger_than_its_header_is_refused(side):
    """Pillow itself refuses the larger of them, by a limit of its own."""
    frame = struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00;"
    content = b"GIF89a" + struct.pack("<HHBBB", 3, 3, 0x80, 0, 0) + bytes(6) + b"," + frame
    with pytest.raises(ImageTooLargeError) as caught:
        images.open(content, max_pixels=64_000_000)
    reported = f"{side * side:,}" if side == 20_000 else f"{side} x {side}"
    expected = f"image bytes: {reported} pixels are too many (limit: 64 million). Make the picture smaller."
    assert str(caught.value) == expected


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_damaged_bytes_give_a_picture_or_one_error(options):
    content = encode(scene(64, 48), **options)
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for index in random.integers(0, len(content), 4):
            damaged[index] = random.integers(256)
        with contextlib.suppress(ImageError):
            assert images.open(bytes(damaged), max_pixels=1_000_000).mode == "RGB"


def test_an_interrupt_is_not_caught(monkeypatch):
    def load(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(KeyboardInterrupt):
        images.open(encode(scene(4, 3), format="PNG"))


# Damage that other programs overlook


def with_chunk(png: bytes, extra: bytes, before: bytes = b"IDAT") -> bytes:
    index = png.index(before) - 4
    return png[:index] + extra + png[index:]


EXTRA_CHUNKS = {
    "text": chunk(b"tEXt", b"Comment\0hello", damage=1),
    "transparency": chunk(b"tRNS", b"\0\1\0\1\0\1", damage=1),
    "profile": chunk(b"iCCP", b"name\0\1nothing that is compressed"),
    "long-text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
    "animation": chunk(b"acTL", b"\0\0\0\2\0\0\0\0") + chunk(b"fcTL", b"\0\0\0\7" + bytes(22)),
    "unknown": chunk(b"abCd", b"what is this", damage=1),
}


@pytest.mark.parametrize("extra", EXTRA_CHUNKS.values(), ids=EXTRA_CHUNKS)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_damaged_ancillary_chunks_of_a_png_are_ignored(tmp_path, extra, before):
    path = tmp_path / "a.png"
    path.write_bytes(with_chunk(encode(scene(40, 30), format="PNG"), extra, before))
    assert images.open(path).tobytes() == scene(40, 30).tobytes()
    assert images.read_size(path) == (40, 30)


@pytest.mark.parametrize("end", [b"", b"\0\0", chunk(b"IEND", b"")[:-3], chunk(b"tEXt", b"Comment\0hello")[:15]])
def test_a_png_truncated_after_its_pixels_opens(end):
    content = encode(scene(40, 30), format="PNG")
    assert images.open(content[: content.index(b"IEND") - 4] + end).tobytes() == scene(40, 30).tobytes()


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
def test_a_damaged_critical_chunk_of_a_png_is_an_error(kind):
    content = bytearray(encode(scene(40, 30), format="PNG"))
    index = content.index(kind)
    length = int.from_bytes(content[index - 4 : index])
    content[index + 4 + length - 1] ^= 1
    assert "cannot read this image" in failure(bytes(content))


def orientation_chunks() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    raw = b"\nexif\n" + f"{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n".encode()
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    return {
        "exif": chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        "text": chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        "compressed": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }


@pytest.mark.parametrize("extra", orientation_chunks().values(), ids=orientation_chunks())
def test_the_orientation_in_any_chunk_of_a_png_is_applied(extra):
    assert images.open(with_chunk(encode(scene(40, 30), format="PNG"), extra)).size == (30, 40)


def unended(progressive: bool) -> tuple[bytes, np.ndarray]:
    """A JPEG of noise without the two bytes of its end marker, and its pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise), format="JPEG", progressive=progressive, optimize=True)
    assert content.endswith(b"\xff\xd9")
    return content[:-2], pixels(images.open(content))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("end", [b"", b"\xff"])
@pytest.mark.parametrize("at_least", [None, 20])
def test_a_jpeg_that_lacks_only_its_end_marker_opens(progressive, end, at_least):
    content, expected = unended(progressive)
    opened = images.open(content + end, at_least=at_least)
    if at_least is None:
        assert (pixels(opened) == expected).all()
    else:
        assert opened.size == images.open(content + b"\xff\xd9", at_least=at_least).size


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_pixels_is_an_error(progressive):
    content, _ = unended(progressive)
    for missing in range(1, 120):
        assert "truncated" in failure(content[:-missing])


# Memory


def test_concurrent_decoding_is_limited_by_memory(monkeypatch):
    size = (40, 30)
    monkeypatch.setattr(images, "_budget", images._Budget(2 * 40 * 30 * images.PIXEL_BYTES + 1))
    pairs, decoding, most = threading.Barrier(2), [], []
    to_rgb = images._to_rgb

    def decode(picture):
        decoding.append(id(picture))
        pairs.wait(timeout=30)  # for the other that the memory permits
        most.append(len(decoding))
        pairs.wait(timeout=30)
        decoding.remove(id(picture))
        return to_rgb(picture)

    monkeypatch.setattr(images, "_to_rgb", decode)
    content = encode(scene(*size), format="PNG")
    with ThreadPoolExecutor(8) as threads:
        assert {opened.size for opened in threads.map(images.open, [content] * 8)} == {size}
    assert most == [2] * 8


def test_waiting_pictures_are_decoded_in_order():
    budget, order = images._Budget(3), []

    def use(part):
        with budget.take(part):
            order.append(part)

    with ThreadPoolExecutor(2) as threads:
        with budget.take(2):
            large = threads.submit(use, 3)
            while not budget._turn.locked():
                time.sleep(0.001)
            small = threads.submit(use, 1)
            with pytest.raises(TimeoutError):
                small.result(timeout=0.05)
        large.result(timeout=30)
        small.result(timeout=30)
    assert order == [3, 1]


def test_failed_pictures_release_their_memory(monkeypatch):
    content = encode(Image.effect_noise((40, 30), 80), format="PNG")
    monkeypatch.setattr(images, "_budget", images._Budget(40 * 30 * images.PIXEL_BYTES))
    for _ in range(2):
        assert "cannot read this image" in failure(content[: len(content) // 2])
        assert images.open(content).size == (40, 30)


def test_a_picture_counts_until_it_is_prepared(monkeypatch):
    used = []
    prepare = images.prepare
    monkeypatch.setattr(images, "prepare", lambda *given: used.append(images._budget._used) or prepare(*given))
    settings = ImageSettings(size=32)
    content = encode(scene(40, 30), format="PNG")
    frame, rectangle, size = images.open_frame(content, settings)
    assert used == [40 * 30 * images.PIXEL_BYTES]
    assert images._budget._used == 0
    expected, whole = prepare(images.open(content), settings)
    assert (frame == expected).all()
    assert (rectangle, size) == (whole, (40, 30))


def test_a_picture_that_needs_more_than_all_memory_is_refused(monkeypatch):
    assert images.MAX_PIXELS * images.PIXEL_BYTES <= images.MAX_DECODED
    monkeypatch.setattr(images, "_budget", images._Budget(1_900_000_000))
    black = Image.new("1", (12_000, 10_000))
    assert failure(encode(black, format="PNG")) == (
        "image bytes: 12000 x 10000 pixels need 1.92 GB of memory to decode (limit: 1.90 GB). "
        "Make the picture smaller."
    )


def test_a_reduced_jpeg_counts_as_decoded_and_a_progressive_one_whole(monkeypatch):
    picture = scene(800, 600)
    monkeypatch.setattr(images, "_budget", images._Budget(400 * 300 * images.PIXEL_BYTES))
    assert images.open(encode(picture, format="JPEG"), at_least=300).size == (400, 300)
    assert "need" in failure(encode(picture, format="JPEG", progressive=True), at_least=300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_the_whole_budget():
    code = (
        "import os, numpy\nfrom captioner import images\n"
        "with images._budget.take(images.MAX_DECODED):\n"
        "    child = os.fork()\n"
        "    if not child: os._exit(images.open(numpy.zeros((3, 4), numpy.uint8)).width)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "4\n"


# Large JPEG files


@pytest.mark.parametrize(
    ("size", "at_least", "expected"),
    [
        ((1000, 750), 90, (125, 94)),
        ((1000, 750), 100, (250, 188)),
        ((1000, 750), 375, (500, 375)),
        ((1000, 750), 376, (1000, 750)),
        ((1000, 750), 2000, (1000, 750)),
        ((1000, 30), 30, (1000, 30)),
        ((1000, 750), None, (1000, 750)),
    ],
)
def test_jpeg_is_decoded_no_smaller_than_asked(size, at_least, expected):
    opened = images.open(encode(scene(*size), format="JPEG"), at_least=at_least)
    assert opened.size == expected


def test_the_reduced_decoding_shows_the_same_frame():
    content = encode(scene(1600, 1200), format="JPEG", quality=95)
    for frame in ("stretch", "crop", "pad"):
        settings = ImageSettings(size=64, frame=frame)
        whole, rectangle = images.prepare(images.open(content), settings)
        reduced, same_rectangle = images.prepare(images.open(content, at_least=128), settings)
        assert np.abs(whole - reduced).mean() < 0.01
        assert rectangle == pytest.approx(same_rectangle, abs=0.01)


# Frames


def test_a_picture_of_the_size_of_the_frame_is_not_changed():
    array = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((array / 255 - mean) / std).transpose(2, 0, 1)
    for frame in ("stretch", "crop", "pad"):
        pixels, rectangle = images.prepare(images.open(array), ImageSettings(frame=frame))
        assert pixels.dtype == np.float32
        assert pixels.flags.c_contiguous
        assert np.abs(pixels - expected).max() < 1e-5
        assert rectangle == (0, 0, 1, 1)


@pytest.mark.parametrize("frame", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(400, 200), (150, 333), (64, 64), (65, 64), (20, 31), (1000, 700)])
def test_a_shape_is_found_through_the_rectangle(frame, size):
    """Draw a box at known fractions of a picture, find it in the frame, and map it back."""
    width, height = size
    truth = (0.4 * width, 0.35 * height, 0.55 * width, 0.6 * height)
    picture = Image.new("RGB", size, "black")
    ImageDraw.Draw(picture).rectangle(
        (round(truth[0]), round(truth[1]), round(truth[2]) - 1, round(truth[3]) - 1), fill="white"
    )
    side = 96
    pixels, shown = images.prepare(picture, ImageSettings(size=side, frame=frame, mean=(0.5, 0.5, 0.5)))
    rows, columns = np.nonzero(pixels[0] > 0)
    across, down = (shown.right - shown.left) / side, (shown.bottom - shown.top) / side
    found = (
        shown.left + columns.min() * across,
        shown.top + rows.min() * down,
        shown.left + (columns.max() + 1) * across,
        shown.top + (rows.max() + 1) * down,
    )
    cell_x, cell_y = max(across, 1 / width), max(down, 1 / height)
    for value, true, length, cell in zip(found, truth, size * 2, (cell_x, cell_y) * 2, strict=True):
        assert float(value) == pytest.approx(round(true) / length, abs=0.75 * cell)


def test_crop_shows_the_centre_square():
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))
    pixels, rectangle = images.prepare(picture, ImageSettings(size=50, frame="crop", mean=(0, 0, 0), std=(1, 1, 1)))
    assert rectangle == pytest.approx((1 / 3, 0, 2 / 3, 1))
    assert pixels[:, :, 2:-2].min() > 0.99


def test_pad_borders_the_whole_picture_with_the_mean_colour():
    pixels, rectangle = images.prepare(Image.new("RGB", (50, 200), "white"), ImageSettings(size=100, frame="pad"))
    assert rectangle == pytest.approx((-37 / 25, 0, 63 / 25, 1))
    assert np.count_nonzero(pixels[:, :, :37]) == 0
    assert np.count_nonzero(pixels[:, :, 62:]) == 0
    assert pixels[:, :, 37:62].min() > 1


@pytest.mark.parametrize("frame", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_pictures_of_any_shape_fill_a_frame(frame, size):
    picture = images.open(encode(Image.new("RGB", size, "red"), format="PNG"), at_least=64)
    pixels, rectangle = images.prepare(picture, ImageSettings(size=32, frame=frame))
    assert pixels.shape == (3, 32, 32)
    assert np.isfinite(pixels).all()
    assert pixels[0].max() == pytest.approx((1 - 0.485) / 0.229, abs=1e-5)
    assert rectangle.left < rectangle.right
    assert rectangle.top < rectangle.bottom


def test_a_very_long_picture_needs_little_memory():
    resource = pytest.importorskip("resource")
    picture = Image.new("RGB", (1, 1_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images.prepare(picture, ImageSettings())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes; it was 900 MB


# Names and settings


def test_messages_call_a_source_by_its_path_or_kind(tmp_path):
    assert images.name("a/b.jpg") == "a/b.jpg"
    assert images.name(Path("b.jpg")) == "b.jpg"
    assert images.name("-") == "standard input"
    assert images.name(b"") == "image bytes"
    assert images.name(np.zeros(1)) == "image array"
    assert images.name(Image.new("L", (1, 1))) == "PIL image"
    path = tmp_path / "c.png"
    scene(4, 3).save(path)
    with Image.open(path) as picture:
        assert images.name(picture) == str(path)


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        ("a.jpg", True),
        ("B.JPEG", True),
        (Path("c.tif"), True),
        ("d.txt", False),
        ("png", False),
        ("._e.jpg", False),
    ],
)
def test_a_folder_scan_takes_image_suffixes(path, taken):
    assert images.is_image_path(path) is taken


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"size": 0}, "size"),
        ({"size": 1025}, "size"),
        ({"frame": "squash"}, "frame"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": (0.5, 0.5, 1e308)}, "mean"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"std": (0.2, 1e-300, 0.2)}, "std"),
        ({"std": (0.2, float("inf"), 0.2)}, "std"),
    ],
)
def test_invalid_image_settings_are_refused(values, field):
    with pytest.raises(ValueError, match=rf"^{field}(\[\d\])?: (expected|must be) "):
        ImageSettings(**values)
    with pytest.raises(ConfigError, match=rf"^header: {field}(\[\d\])?: (expected|must be) "):
        from_dict(ImageSettings, values, "header")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_threads_may_open_the_same_pil_image(tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    Image.effect_noise((900, 700), 80).save(path)
    expected = images.open(path).tobytes()
    for _ in range(5):
        with Image.open(path) as picture, ThreadPoolExecutor(8) as threads:
            opened = list(threads.map(images.open, [picture] * 8))
        assert {item.tobytes() for item in opened} == {expected}
