import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL._util import DeferredError

from captioner import images
from captioner.caption import Caption, Rectangle
from captioner.errors import CaptionerError
from captioner.images import ImageSettings
from captioner.overlay import (
    ACCENT,
    COLOURS,
    DIMMED,
    FIGURE_WIDTH,
    GAP,
    INK,
    PAPER,
    PAUSE,
    VEIL,
    animate_attention,
    describe_attention,
    draw_attention,
    draw_layer,
    fit_to_panel,
    group_words,
    light_up,
    pick_head,
    save_animation,
    spread_light,
)

GREEN = (20, 120, 20)
EVERYTHING = Rectangle(0, 0, 1, 1)


def make_caption(words, attention=None, rectangle=EVERYTHING):
    if attention is None:
        attention = np.full((len(words), 7, 7), 1 / 49, np.float32)
    log_probs = (-0.5,) * len(words)
    return Caption(
        words=tuple(words),
        text=" ".join(words),
        log_probs=log_probs,
        log_prob=sum(log_probs),
        score=sum(log_probs),
        attention=attention,
        rectangle=rectangle,
    )


def panels_of(figure):
    """Where a figure of a green picture shows panels: titles and paper are grey. (height, width), bool."""
    pixels = np.asarray(figure).astype(int)
    return pixels[..., 1] - pixels[..., 0] > 10


def dimmed(value):
    """A colour, or one of its channels, where no light falls."""
    return DIMMED * value + (1 - DIMMED) * 255 * VEIL


def starts(line):
    """Where the runs of true values begin."""
    return np.flatnonzero(np.diff(line.astype(int), prepend=0) == 1)


@pytest.mark.parametrize("frame", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(400, 400), (640, 400), (300, 500), (900, 200)])
def test_light_is_where_the_shape_was_drawn(frame, size):
    width, height = size
    side = min(size)
    x, y = (width / 2 + 0.3 * side, height / 2 - 0.2 * side) if frame == "crop" else (0.8 * width, 0.3 * height)
    scene = Image.new("RGB", size, GREEN)
    ImageDraw.Draw(scene).circle((x, y), side / 12, "red")

    seen, rectangle = images.prepare(scene, ImageSettings(frame=frame))
    redness = (seen[0] - seen[1]).clip(min=0)  # what a network that looks for red would attend to
    weights = redness.reshape(1, 14, 16, 14, 16).mean(axis=(2, 4))  # (1, 14, 14)
    caption = make_caption(["red"], weights / weights.sum(), rectangle)
    figure = draw_attention(Image.new("RGB", size, GREEN), caption)

    rows, columns = np.nonzero(panels_of(figure))
    left = columns[columns > figure.width / 2].min()  # of the panel of the word
    panel = np.asarray(figure)[rows.min() : rows.max() + 1, left : columns.max() + 1].sum(axis=2)
    bright = np.argwhere(panel > 0.97 * panel.max())
    down, across = (bright.mean(axis=0) + 0.5) / panel.shape
    assert abs(across - x / width) < 0.6 * (rectangle.right - rectangle.left) / 14
    assert abs(down - y / height) < 0.6 * (rectangle.bottom - rectangle.top) / 14


def test_parts_outside_of_the_input_stay_dim():
    grey = Image.new("RGB", (200, 100), (100, 100, 100))
    weights = np.zeros((7, 7))
    weights[:, [0, 6]] = 1 / 14  # at its left and right border, it looked as much as it could
    panel = np.asarray(light_up(grey, weights, Rectangle(0.25, 0, 0.75, 1)))[..., 0]
    assert (panel[:, :50] == round(dimmed(100))).all()
    assert (panel[:, 150:] == round(dimmed(100))).all()
    assert (panel[:, [50, 149]] == 100).all()
    assert (panel[:, 100] == round(dimmed(100))).all()


def test_the_largest_weight_has_full_light_and_the_average_none():
    weights = np.ones((7, 7))
    weights[:, :3], weights[:, 4:] = 0.2, 4
    light = spread_light(weights, EVERYTHING, 70, 70)
    assert light[:, 60:] == pytest.approx(1, abs=0.02)
    assert (light[:, :30] == 0).all()
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8))
    panel, pixels = np.asarray(light_up(photograph, weights, EVERYTHING)).astype(int), np.asarray(photograph)
    assert np.abs(panel[:, 60:] - pixels[:, 60:]).max() <= 4
    assert np.abs(panel[:, :30] - dimmed(pixels[:, :30])).max() <= 0.5


def test_uniform_attention_has_no_light():
    assert (spread_light(np.full((7, 7), 1 / 49, np.float32), EVERYTHING, 30, 20) < 1e-4).all()


@pytest.mark.parametrize("grid", [7, 14])
def test_small_differences_are_not_exaggerated(grid):
    """Weights that differ by 5 % leave the picture nearly dim; twice the average has full light."""
    noise = 1 + 0.05 * np.random.default_rng(0).uniform(-1, 1, (grid, grid))
    assert spread_light(noise, EVERYTHING, 60, 60).max() < 0.1
    left = np.ones((grid, grid))
    left[:, : grid // 2 + 1], left[:, grid // 2 + 1 :] = 2, 0.01
    left *= 1 / left.mean()
    assert spread_light(left, EVERYTHING, 60, 60).max() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255)])
def test_black_and_white_pictures_show_what_is_dim(colour):
    weights = np.full((7, 7), 0.001)
    weights[3, 3] = 1
    panel = np.asarray(light_up(Image.new("RGB", (70, 70), colour), weights, EVERYTHING)).astype(int)
    assert np.abs(panel[35, 35] - panel[0, 0]).min() > 20


def test_attention_on_padding_has_no_light():
    weights = np.zeros((9, 9))
    weights[0] = 1 / 9  # the picture begins three rows further down
    panel = light_up(Image.new("RGB", (120, 40), GREEN), weights, Rectangle(0, -1, 1, 2))
    assert np.asarray(panel)[..., 1].max() < 1.1 * dimmed(GREEN[1])


def test_light_grows_with_attention_and_is_smooth():
    weights = np.arange(1, 8)[None].repeat(7, axis=0) / 196
    panel = np.asarray(light_up(Image.new("RGB", (300, 300), GREEN), weights, EVERYTHING)).astype(int)
    steps = np.diff(panel[150, :, 1])
    assert steps.min() >= 0
    assert steps.max() <= 3
    assert panel[150, -1, 1] > 2 * panel[150, 0, 1]


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (2000, 200), (200, 2000)])
def test_there_is_a_panel_for_the_picture_and_for_each_word(size):
    shown = panels_of(draw_attention(Image.new("RGB", size, GREEN), make_caption(["word"] * 20)))
    tops, lefts = starts(shown.any(axis=1)), starts(shown.any(axis=0))
    corners = [shown[top, left] for top in tops for left in lefts]
    assert sum(corners) == 21
    assert shown.shape[1] <= FIGURE_WIDTH + GAP


def test_the_first_panel_is_the_picture_itself():
    figure = draw_attention(Image.new("RGB", (300, 300), GREEN), make_caption([]))
    assert (np.asarray(figure)[panels_of(figure)] == GREEN).all()


def test_function_words_share_the_panel_of_the_word_after_them():
    words = ["there", "is", "a", "dog", "on", "the", "grass", "next", "to", "it"]
    assert [[words[index] for index in group] for group in group_words(words)] == [
        ["there", "is", "a", "dog"],
        ["on", "the", "grass"],
        ["next", "to", "it"],
    ]
    assert [list(group) for group in group_words(["犬", "が"])] == [[0], [1]]
    assert group_words([]) == []
    attention = np.full((3, 7, 7), 0.001)
    attention[[0, 1, 2], [1, 3, 5], [1, 3, 5]] = 1
    picture = Image.new("RGB", (300, 300), GREEN)
    figure = draw_attention(picture, make_caption(["a", "the", "dog"], attention))
    assert starts(panels_of(figure).any(axis=0)).size == 2
    assert (np.asarray(figure)[40:340, -316:-16] == np.asarray(light_up(picture, attention[2], EVERYTHING))).all()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([[0.25, 0.25], [0.25, 0.25]], "1.0 × average"), ([[0.1, 0.1], [0.55, 0.25]], "2.2 × average")],
)
def test_attention_is_described_by_its_largest_weight(weights, expected):
    assert describe_attention(np.array(weights)) == expected


@pytest.mark.parametrize("size", [(300, 300), (60, 600), (1, 1)])
def test_the_legend_stands_below_the_panels(size):
    figure = draw_attention(Image.new("RGB", size, GREEN), make_caption(["dog"]))
    below = np.asarray(figure)[np.flatnonzero(panels_of(figure).any(axis=1))[-1] + 1 :]
    ink = (below < 200).any(axis=2)
    assert ink.any()
    assert not ink[:, -1].any()


@pytest.mark.parametrize("size", [(300, 300), (60, 600)])
@pytest.mark.parametrize("word", ["extraordinarily", "x" * 200, "two\nlines", "犬" * 40])
def test_titles_do_not_overlap(size, word):
    figure = draw_attention(Image.new("RGB", size, GREEN), make_caption([word] * 8))
    assert figure.width <= FIGURE_WIDTH + GAP
    pixels = np.asarray(figure)[: np.flatnonzero(panels_of(figure).any(axis=1))[-1]]  # without the legend
    for left in starts(panels_of(figure).any(axis=0)):
        assert (pixels[:, left - GAP : left] == 255).all()
    for top in starts(panels_of(figure).any(axis=1)):
        assert (pixels[top - 3 : top] == 255).all()


@pytest.mark.parametrize("word", ["", " ", "собака", "犬", "كلب", "😀", "b\udcff", "a\tb", "\x00"])
def test_any_word_can_be_drawn(word):
    draw_attention(Image.new("RGB", (30, 20), GREEN), make_caption([word]))


@pytest.mark.parametrize("letter", ["é", "ü", "ß", "ő", "я", "λ", "…"])
def test_non_ascii_letters_are_drawn(letter):
    figure, without_glyph = (
        draw_attention(Image.new("RGB", (30, 20), GREEN), make_caption([word])) for word in (letter, "\U000f0000")
    )
    assert figure != without_glyph


def test_a_missing_freetype_is_reported(monkeypatch):
    missing = DeferredError.new(ImportError("The _imagingft C module is not installed"))
    monkeypatch.setattr(ImageFont, "core", missing)
    with pytest.raises(CaptionerError, match=r"overlays need FreeType.*pip install"):
        draw_attention(Image.new("RGB", (30, 20), GREEN), make_caption(["dog"]))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (9000, 1), (1, 9000)])
def test_pictures_of_extreme_shapes_are_drawn(size):
    figure = draw_attention(Image.new("RGB", size, GREEN), make_caption(["a", "b"]))
    assert max(figure.size) < 5000


def test_a_rotated_photograph_is_drawn_upright():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    Image.new("RGB", (800, 400), GREEN).save(file, "JPEG", exif=exif)
    shown = panels_of(draw_attention(file.getvalue(), make_caption([])))
    assert shown.any(axis=1).sum() == pytest.approx(2 * shown.any(axis=0).sum(), abs=2)


@pytest.mark.parametrize("colours", COLOURS)
def test_the_brightest_location_has_the_largest_weight_in_every_colour(colours):
    weights = np.full((7, 7), 0.001)
    weights[1, 5] = 1
    panel = np.asarray(light_up(Image.new("RGB", (140, 140), (90, 90, 90)), weights, EVERYTHING, colours))
    row, column = np.unravel_index(panel.sum(axis=2).argmax(), panel.shape[:2])
    assert (row // 20, column // 20) == (1, 5)


def test_parts_outside_of_the_input_are_black_in_colour_maps():
    weights = np.eye(7) / 7  # most of it has no light
    layer = draw_layer(weights, Rectangle(0.25, 0, 0.75, 1), 200, 100, "viridis")
    assert not layer[:, :50, :3].any()
    assert layer[:, 50:150, :3].any(axis=2).all()
    assert (layer[..., 3] == layer[0, 0, 3]).all()


def test_unknown_colours_are_refused():
    with pytest.raises(CaptionerError, match="colours 'jet': expected one of white, viridis"):
        light_up(Image.new("RGB", (9, 9)), np.ones((2, 2)), EVERYTHING, "jet")


@pytest.mark.parametrize("size", [(640, 400), (300, 500), (20, 15), (2000, 100)])
def test_an_animation_has_a_frame_for_each_word(size):
    words = ["a", "dog", "that", "runs", "through", "remarkably", "tall", "grass", "with", "its", "tongue", "out"]
    attention = np.full((len(words), 7, 7), 0.001, np.float32)
    for index in range(len(words)):
        attention[index, index % 7, index % 5] = 1
    picture = Image.new("RGB", size, GREEN)
    frames = animate_attention(picture, make_caption(words, attention))
    assert len(frames) == 1 + len(words)
    assert len({frame.size for frame in frames}) == 1
    width, height = fit_to_panel(picture).size
    for index, frame in enumerate(frames[1:]):
        left = (frame.width - width) // 2
        shown = np.asarray(frame)[:height, left : left + width].astype(int)
        expected = light_up(fit_to_panel(picture), attention[index], EVERYTHING)
        assert (shown == np.asarray(expected)).all()
        # The word itself is underlined, below the picture and nowhere else.
        accent = (np.asarray(frame) == (0xA8, 0x48, 0x0F)).all(axis=2)
        assert accent.any()
        assert not accent[:height].any()
    assert (np.asarray(frames[0]) != np.asarray(frames[1])).any()


def test_a_saved_animation_has_every_frame(tmp_path):
    frames = animate_attention(Image.new("RGB", (60, 40), GREEN), make_caption(["a", "red", "dog"]))
    with (tmp_path / "dog.gif").open("wb") as file:
        save_animation(frames, file)
    with Image.open(tmp_path / "dog.gif") as saved:
        assert saved.n_frames == 4
        assert saved.size == frames[0].size
        assert saved.info["loop"] == 0
        assert saved.info["duration"] == 1000 * PAUSE


def test_an_animation_keeps_accent_colour_and_smooth_light():
    across = np.linspace(0, 255, 300, dtype=np.uint8)
    colourful = np.stack(np.broadcast_arrays(across[:, None], across[None], across[::-1, None]), axis=-1)
    maps = np.random.default_rng(0).dirichlet(np.full(49, 0.3), 1).reshape(1, 7, 7).astype(np.float32)
    frames = animate_attention(Image.fromarray(colourful), make_caption(["dog"], maps))
    file = io.BytesIO()
    save_animation(frames, file)
    with Image.open(file) as saved:
        saved.seek(1)
        shown = saved.convert("RGB")
    paper = np.asarray(shown.crop((0, 300, *shown.size))).reshape(-1, 3).astype(int)
    for colour in (ACCENT, INK, PAPER):
        assert np.abs(paper - ImageColor.getrgb(colour)).max(axis=1).min() <= 6
    seen, meant = (np.asarray(item.crop((0, 0, 300, 300)).reduce(6)).astype(int) for item in (shown, frames[1]))
    assert np.abs(seen - meant).mean() < 2


def test_a_selected_head_becomes_the_attention():
    heads = np.random.default_rng(0).dirichlet(np.ones(49), (1, 2)).reshape(1, 2, 7, 7).astype(np.float32)
    caption = replace(make_caption(["dog"], heads.mean(axis=1)), heads=heads)
    assert (pick_head(caption, 1).attention == heads[:, 1]).all()
    with pytest.raises(CaptionerError, match="head 2: this caption's attention has 2 heads"):
        pick_head(caption, 2)
