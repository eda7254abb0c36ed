import base64
import io
import os
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from PIL import Image

from captioner.caption import Caption, Captions, Rectangle
from captioner.overlay import DIMMED, VEIL, fit_to_panel, light_up
from captioner.page import GALLERY, POLICY, document, figure, overlay_page

GREEN = (20, 120, 20)
EVERYTHING = Rectangle(0, 0, 1, 1)


def make_caption(words, attention=None, rectangle=EVERYTHING, **others):
    if attention is None:
        attention = np.full((len(words), 7, 7), 1 / 49, np.float32)
    text = " ".join(words).replace(" 's", "'s")
    return Caption(text, tuple(words), (-0.5,) * len(words), -1.0, -1.0, attention, rectangle, **others)


def one_bright_place(row, column, grid=7):
    weights = np.full((grid, grid), 0.001, np.float32)
    weights[row, column] = 1
    return (weights / weights.sum())[None]


def images_of(page):
    """The images of a page, in their order: the photographs and, each after its own, the lights of its words."""
    return [
        Image.open(io.BytesIO(base64.b64decode(content)))
        for content in re.findall(r'src="data:image/(?:jpeg|png);base64,([^"]+)"', page)
    ]


def lay_over(photograph, light):
    """What a browser shows: it blends colours that are multiplied by their opacity, also while it stretches."""
    layer = np.asarray(light.convert("RGBA").convert("RGBa").resize(photograph.size, Image.Resampling.BILINEAR))
    return np.asarray(photograph) * (1 - layer[..., 3:] / 255.0) + layer[..., :3]


def visible_text(page):
    return unescape(re.sub(r"<[^>]*>", "", re.sub(r'<span class="look">.*?</span></span>', "</span>", page)))


@pytest.mark.parametrize("size", [(300, 300), (640, 400), (300, 500), (40, 30)])
@pytest.mark.parametrize("rectangle", [EVERYTHING, Rectangle(-0.25, 0, 1.25, 1), Rectangle(0, -1, 1, 2)])
@pytest.mark.parametrize("grid", [7, 14])
def test_the_light_is_that_of_the_overlay(size, rectangle, grid):
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.full(grid * grid, 0.3)).reshape(grid, grid).astype(np.float32)
    picture = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    _, light = images_of(figure(picture, make_caption(["dog"], weights[None], rectangle)))
    photograph = fit_to_panel(picture)
    expected = np.asarray(light_up(photograph, weights, rectangle))
    assert np.abs(lay_over(photograph, light) - expected).max() < 12  # of 255; what a coarse light may miss
    assert np.abs(lay_over(photograph, light) - expected).mean() < 1


def test_what_the_network_did_not_see_is_dim():
    picture = Image.new("RGB", (400, 200), GREEN)
    weights = np.tile([1, 0, 0, 0, 0, 0, 1], (1, 7, 1)) / 14  # at the borders of what it saw, as much as it could
    _, light = images_of(figure(picture, make_caption(["dog"], weights, Rectangle(0.25, 0, 0.75, 1))))
    shown = lay_over(fit_to_panel(picture), light)[..., 1]
    width = shown.shape[1]
    dim = DIMMED * GREEN[1] + (1 - DIMMED) * 255 * VEIL
    assert shown[:, : width // 4 - 5] == pytest.approx(dim, abs=1)
    assert shown[:, -width // 4 + 5 :] == pytest.approx(dim, abs=1)
    assert shown[:, [width // 4 + 5, -width // 4 - 5]].min() > 100


def test_a_word_has_its_probability_and_its_largest_weight_in_words():
    page = figure(Image.new("RGB", (9, 9)), make_caption(["dog"], one_bright_place(0, 0)))
    assert ">61% likely · brightest spot: 46.8 × average attention</span>" in page
    page = figure(Image.new("RGB", (9, 9)), make_caption(["dog"], visual=(0.25,)))
    assert "brightest spot: 1.0 × average attention · 25% from the picture</span>" in page


def test_the_words_read_as_the_caption_and_so_does_the_alternative_text():
    page = figure(Image.new("RGB", (9, 9)), make_caption(["a", "dog", "'s", "ball"]), name="dog.jpg")
    assert visible_text(page) == "dog.jpga dog's ball"
    assert 'alt="a dog&#x27;s ball"' in page
    assert page.count('tabindex="0"') == 4


def test_a_caption_without_words_says_so():
    page = figure(Image.new("RGB", (9, 9)), make_caption([]))
    assert 'alt="no caption"' in page
    assert visible_text(page) == "no words"


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (9000, 1), (1, 9000), (300, 40), (40, 300)])
def test_pictures_of_any_shape_can_be_shown(size):
    page = figure(Image.new("RGB", size, GREEN), make_caption(["a", "b"]))
    photograph, first, second = images_of(page)
    assert photograph.width * photograph.height <= 1.1 * 300**2
    assert first.size == second.size


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"onload="alert(1)', "'><b>", "&lt;", "</title><b>"])
def test_no_text_becomes_markup(text):
    expected = "".join(
        {"<": "&lt;", ">": "&gt;", "&": "&amp;", '"': "&quot;", "'": "&#x27;"}.get(c, c) for c in text
    )
    page = document(text, figure(Image.new("RGB", (9, 9)), make_caption([text]), text))
    assert text not in page.replace(expected, "")
    assert page.count(expected) == 4  # the title, the alternative text, the name, the word


def test_a_page_fetches_and_runs_nothing():
    page = document("dog", figure(Image.new("RGB", (9, 9)), make_caption(["dog"])))
    assert f'http-equiv="Content-Security-Policy" content="{POLICY}"' in page
    assert "default-src 'none'" in POLICY
    assert "script" not in page
    assert not re.findall(r"https?:|url\(|@import|src=\"(?!data:)|href", page)


def look_at(photograph):
    """The inner 50 x 50 of the 70 x 70 pixels that a photograph as the window shows it is brought to."""
    box = photograph.bounding_box()
    screen = Image.open(io.BytesIO(photograph.page.screenshot(full_page=True))).convert("RGB")
    box = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
    return np.asarray(screen.crop(tuple(map(round, box))).resize((70, 70)))[10:60, 10:60].astype(int)


TWO_PLACES = np.concatenate([one_bright_place(1, 1), one_bright_place(5, 5)])


def assert_lit(pixels, row, column):
    """Cell (row, column) of 7 x 7 shines, and the cell across the picture is dim."""
    expected = np.asarray(light_up(Image.new("RGB", (70, 70), GREEN), one_bright_place(row, column)[0], EVERYTHING))
    assert np.abs(pixels - expected[10:60, 10:60]).max() <= 6


def assert_as_it_is(pixels):
    assert np.abs(pixels - GREEN).max() <= 3  # what JPEG and colours of the screen cost


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("size", [(300, 300), (640, 400), (400, 640)])
def test_pointing_at_a_word_lights_its_place_in_a_browser(visit, width, size):
    pictures = [figure(Image.new("RGB", size, GREEN), make_caption(["dog", "ball"], TWO_PLACES))] * 2
    tab = visit(document("dog", "".join(pictures)), width)
    first, second = (tab.locator(".captioned > .panel").nth(number) for number in (0, 1))
    words = tab.locator(".word")
    assert_as_it_is(look_at(first))
    words.nth(0).hover()
    assert_lit(look_at(first), 1, 1)
    assert_as_it_is(look_at(second))
    words.nth(1).click()  # and so it has the focus
    words.nth(0).hover()
    assert_lit(look_at(first), 1, 1)
    tab.mouse.move(0, 0)
    assert_lit(look_at(first), 5, 5)


@pytest.mark.slow
def test_the_keyboard_alone_reaches_the_words_in_a_browser(visit):
    tab = visit(
        document("dog", figure(Image.new("RGB", (300, 300), GREEN), make_caption(["dog", "ball"], TWO_PLACES)))
    )
    photograph = tab.locator(".captioned > .panel")
    for index in (1, 5):
        tab.keyboard.press("Tab")
        assert_lit(look_at(photograph), index, index)
        assert tab.locator(".figures").nth(index // 5).is_visible()
    tab.keyboard.press("Tab")
    assert_as_it_is(look_at(photograph))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("size", [(640, 400), (400, 640), (2000, 200), (40, 30)])
def test_the_page_of_an_overlay_cuts_nothing_off_and_covers_no_word(visit, width, size):
    words = ["a", "woman", "in", "a", "pink", "dress", "is", "holding", "a", "large", "red", "umbrella"]
    others = ({"something": -0.1, "photograph": -1.0, "skateboarding": -2.0},) * 12
    caption = make_caption(words, alternatives=others, visual=(1.0,) * 12)
    tab = visit(overlay_page(Image.new("RGB", size, GREEN), caption, "dog.jpg"), width)
    top = min(box["y"] for box in (word.bounding_box() for word in tab.locator(".word").all()))
    for index in range(12):
        tab.keyboard.press("Tab")
        assert tab.locator(":focus").text_content().startswith(words[index])
        figures = tab.locator(":focus .figures")
        assert figures.evaluate("figures => figures.scrollWidth <= figures.clientWidth")
        box = figures.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= top


@pytest.mark.slow
@pytest.mark.parametrize("size", [(300, 300), (3000, 100), (100, 3000), (1, 1)])
def test_a_narrow_window_never_scrolls_sideways(visit, size):
    words = ["dog", "x" * 100, "'s"]
    tab = visit(document("dog", figure(Image.new("RGB", size), make_caption(words), "y" * 200)), width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360


def test_alternatives_stand_beside_a_words_probability():
    others = ({"cat": -1.0, "<b>": -9.0}, {})
    page = figure(Image.new("RGB", (9, 9)), make_caption(["dog", "runs"], alternatives=others))
    assert "<br>instead: cat (37%), &lt;b&gt; (under 1%)</span>" in page
    assert page.count("<br>instead") == 1
    assert 'class="captioned roomy"' in page


def test_unsure_words_and_captions_are_marked_and_told():
    caption = make_caption(["a", "dog", "runs"], confidence=0.31, word_confidences=(None, 0.9, 0.2))
    page = figure(Image.new("RGB", (64, 64), GREEN), caption)
    assert re.findall(r'<span class="(word[^"]*)"', page) == ["word sure", "word sure", "word unsure"]
    assert "unsure: 31% confident of all that it names" in visible_text(page)
    assert ">90% confident · 61% likely" in page
    assert ">20% confident · 61% likely" in page
    sure = figure(Image.new("RGB", (64, 64), GREEN), replace(caption, confidence=0.5))
    assert "unsure:" not in visible_text(sure)
    assert "50% confident of all that it names" in visible_text(sure)


def test_without_a_calibration_nothing_is_told_of_confidence():
    page = figure(Image.new("RGB", (64, 64), GREEN), make_caption(["a", "dog"]))
    assert "confident" not in page
    assert re.findall(r'<span class="(word[^"]*)"', page) == ["word", "word"]


NOTEBOOK = "<!DOCTYPE html><html><body>{}</body></html>"


def frames_of(text):
    """Return the documents in the frames of a notebook's output."""
    return [unescape(content) for content in re.findall(r' srcdoc="([^"]*)"', text)]


def test_a_notebook_shows_the_figure_of_a_caption_in_a_frame_of_its_own():
    picture = Image.new("RGB", (64, 64), GREEN)
    caption = make_caption(["dog"], one_bright_place(1, 1), picture=picture)
    (frame,) = frames_of(caption._repr_html_())
    assert figure(picture, caption) in frame
    assert f'http-equiv="Content-Security-Policy" content="{POLICY}"' in frame


@pytest.mark.parametrize("text", ["</iframe><script>alert(1)</script>", '"><b onclick="x', "&quot;>", "'"])
def test_no_text_leaves_the_frame(text, tmp_path):
    path = tmp_path / f"{text.replace('/', '')}.png"
    Image.new("RGB", (9, 9)).save(path)
    output = Captions([make_caption([text], picture=path), make_caption([text])])._repr_html_()
    tags = re.sub(r'"[^"]*"', "", output)
    assert re.findall(r"<(\w+)", tags) == ["div", "iframe", "iframe"]
    assert tags.count("<iframe sandbox= title= srcdoc= style=></iframe>") == 2
    assert "script>" not in output.replace("script&amp;gt;", "").replace("script&gt;", "")


def test_without_its_picture_a_caption_is_shown_as_words(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for picture in (None, "-", tmp_path / "absent.png", tmp_path, tmp_path / "text.png", io.BytesIO(), "a\0b"):
        (frame,) = frames_of(make_caption(["a", "dog"], picture=picture)._repr_html_())
        assert "a dog" in visible_text(frame)
        assert "61% likely" in frame
        assert not images_of(frame)


def test_a_name_that_is_not_utf8_is_displayed(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xe9.png"
    Image.new("RGB", (9, 9)).save(os.fsdecode(path), "PNG")
    output = make_caption(["dog"], picture=os.fsdecode(path))._repr_html_()
    assert "\\udce9.png" in output.encode().decode()


def test_without_maps_the_words_have_figures_and_no_light():
    caption = make_caption(["a", "dog"], np.zeros((2, 0, 0), np.float32), picture=Image.new("RGB", (64, 64), GREEN))
    (frame,) = frames_of(caption._repr_html_())
    assert len(images_of(frame)) == 1
    assert ">61% likely</span>" in frame


def test_a_list_is_a_gallery_of_a_bounded_size():
    captions = Captions([make_caption(["dog"])] * (GALLERY + 1))
    assert len(frames_of(captions._repr_html_())) == GALLERY
    assert f"{GALLERY} of {GALLERY + 1} captions" in captions._repr_html_()
    assert "captions" not in Captions(captions[1:])._repr_html_()


@pytest.mark.slow
def test_frames_show_everything_and_light_the_picture_in_a_browser(visit):
    captions = Captions()
    sizes = {(640, 400): 2, (400, 640): 20, (3000, 100): 12, (100, 3000): 12, None: 20}
    for size, count in sizes.items():  # and the number of words
        words = (["umbrella", "a", "woman", "of", "striped", "in"] * 4)[:count]
        maps = np.repeat(one_bright_place(1, 1), count, axis=0)
        picture = size and Image.new("RGB", size, GREEN)
        confidences = {"confidence": 0.4, "word_confidences": (0.9,) * count}
        captions.append(make_caption(words, maps, picture=picture, **confidences))
    tab = visit(NOTEBOOK.format("".join(map(Caption._repr_html_, captions)) + captions._repr_html_()))
    frames = tab.frames[1:]
    assert len(frames) == 2 * len(captions)
    for frame in frames:
        height = frame.evaluate("innerHeight")
        assert frame.evaluate("document.documentElement.scrollHeight") == height
        assert height - frame.evaluate("document.querySelector('.trust').getBoundingClientRect().bottom") < 70
    frames[0].locator(".word").first.hover()
    assert frames[0].locator(".figures").first.is_visible()
    assert_lit(look_at(frames[0].locator(".captioned > .panel")), 1, 1)
