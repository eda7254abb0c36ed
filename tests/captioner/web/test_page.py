import base64
import io
import json
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from captioner import overlay
from captioner import page as overlay_page
from captioner.caption import Caption, Rectangle
from captioner.captioning import Captioner
from captioner.images import ImageSettings
from captioner.overlay import light_up

STATIC = Path(overlay_page.__file__).parent / "web" / "static"
GREEN = (20, 120, 20)
MAX_BYTES = 8 << 20
TRIES = 6  # of server.js, while the server is busy
PLACES = ((1, 1), (1, 5), (5, 1), (5, 5))  # row and column of 7 x 7 at which each word looks
LONG = ((3000, 60), (60, 3000), (1, 1))
SENTENCES = ("a dog 's ball", "two cats", "one <b> cat")


class Scripted(Captioner):
    """Says the same of every picture, and looks where the tests expect it."""

    sentences = SENTENCES

    def caption_prepared(self, pictures, settings):
        captions_of_picture = []
        for picture in pictures:
            captions = [make_caption(words.split(), picture.rectangle) for words in self.sentences]
            captions_of_picture.append(replace(captions[0], candidates=tuple(captions[1 : settings.candidates])))
        return captions_of_picture


def map_of(index):
    """Where a word looks: the first two at their index alone, the others there a little more than elsewhere."""
    weights = np.full((7, 7), 0.0 if index < 2 else 1.0)
    weights[PLACES[index % 4]] = 2
    return weights / weights.sum()


def make_caption(words, rectangle):
    maps = np.array([map_of(index) for index in range(len(words))], np.float32)
    return Caption(
        text=" ".join(words).replace(" 's", "'s"),
        words=tuple(words),
        log_probs=(-0.5,) * len(words),
        log_prob=-0.7 * (len(words) + 1),
        score=-0.7,
        attention=maps,
        rectangle=rectangle,
        visual=(0.25,) * len(words),
        alternatives=({"cat": -1.0, "2": -3.0, "puppy": -2.0},) * len(words),
    )


@pytest.fixture
def visit(browser, serve, tiny):
    """Open the page in a window. Nothing on it may complain, and it may send requests to its server only."""
    opened = []

    def visit(width=1280, captioner=None, is_failing=False, script="", **options):
        frame = ImageSettings(size=64, frame="crop")  # so that the network does not see all of a picture
        scripted = Scripted(tiny.engine, replace(tiny.header, images=frame))
        address = f"http://127.0.0.1:{serve(captioner or scripted, max_bytes=MAX_BYTES).port}/"
        settings = {"reduced_motion": "reduce", "viewport": {"width": width, "height": 800}} | options
        context = browser.new_context(**settings)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        tab = context.new_page()
        seen = SimpleNamespace(address=address, context=context, complaints=[], requests=[])
        opened.append(seen)
        tab.on("pageerror", lambda error: seen.complaints.append(str(error)))
        tab.on("request", lambda request: seen.requests.append(request.url))
        tab.on("console", lambda message: is_failing or seen.complaints.append(message.text))
        tab.add_init_script(script)
        tab.goto(address)
        tab.complaints = seen.complaints
        return tab

    yield visit
    for seen in opened:
        seen.context.close()
        assert seen.complaints == []
        assert [url for url in seen.requests if not url.startswith((seen.address, "blob:", "data:"))] == []


def to_file(name="dog.png", size=(300, 300), colour=GREEN, **options):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, name.rpartition(".")[2].upper(), **options)
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content.getvalue()}


def choose(tab, *files):
    """Choose pictures, and wait until each has its caption or its problem."""
    before = tab.locator(".card").count()
    tab.set_input_files("#choose", list(files))
    wait_for(tab, before + len(files))


def wait_for(tab, cards):
    tab.wait_for_function(
        """count => document.querySelectorAll(".card").length == count
        && !document.querySelector("[aria-busy=true], .card:not([data-state])")
        && [...document.images].every(image => image.complete || image.hidden)""",
        arg=cards,
    )


def captions_of(tab):
    return tab.locator(".caption").all_text_contents()


def said(tab):
    return tab.locator("#said").text_content()


def look_at(tab, card=0):
    """The picture of a card as the window shows it, brought to 70 x 70 pixels, of which the inner 50 x 50."""
    box = tab.locator(".picture").nth(card).bounding_box()
    shot = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
    top = box["y"] + tab.evaluate("scrollY")
    shown = shot.crop(tuple(map(round, (box["x"], top, box["x"] + box["width"], top + box["height"]))))
    return np.asarray(shown.resize((70, 70)))[10:60, 10:60].astype(int)


def assert_lit(pixels, index, rectangle=(0, 0, 1, 1)):
    """As the overlays light it: the word's cell shines, and the others are dim."""
    photograph = Image.new("RGB", (70, 70), GREEN)
    expected = np.asarray(light_up(photograph, map_of(index), Rectangle(*rectangle)))[10:60, 10:60]
    assert np.abs(pixels - expected).max() <= 8
    assert pixels[..., 1].max() > 1.5 * pixels[..., 1].min()


def assert_as_it_is(pixels):
    assert np.abs(pixels - GREEN).max() <= 2


def test_a_chosen_picture_is_shown_with_its_caption(visit):
    tab = visit()
    assert tab.locator("#choose").get_attribute("type") == "file"
    assert tab.locator("#choose").get_attribute("accept") == "image/*"  # phones offer their camera
    choose(tab, to_file())
    assert captions_of(tab) == ["a dog's ball"]
    assert tab.get_by_role("img", name="a dog's ball").is_visible()
    assert tab.get_by_role("article", name="dog.png").is_visible()
    assert said(tab) == "dog.png: a dog's ball"
    assert_as_it_is(look_at(tab))


def test_the_caption_is_the_networks(visit, tiny):
    picture = to_file(colour="red")
    tab = visit(captioner=tiny)
    choose(tab, picture)
    assert captions_of(tab) == [tiny.caption(picture["buffer"]).text]
    tab.locator(".word").first.hover()
    assert re.match(r"(under )?\d+% likely · ", tab.locator(".figures").text_content())


@pytest.mark.parametrize(
    ("size", "width"),
    [
        ((400, 200), 1280),
        ((200, 400), 360),
        *(pytest.param((300, 300), width, marks=pytest.mark.slow) for width in (1280, 360)),
        *(pytest.param((24, 16), width, marks=pytest.mark.slow) for width in (1280, 360)),
        pytest.param((400, 200), 360, marks=pytest.mark.slow),
        pytest.param((200, 400), 1280, marks=pytest.mark.slow),
    ],
)
def test_pointing_at_a_word_lights_where_the_network_looked(visit, size, width):
    tab = visit(width)
    choose(tab, to_file(size=size))
    long, short = max(size), min(size)
    margin = (long - short) / 2 / long  # that the network did not see on either side
    rectangle = (margin, 0, 1 - margin, 1) if size[0] > size[1] else (0, margin, 1, 1 - margin)
    words = tab.locator(".word")
    for index in (0, 3):
        words.nth(index).hover()
        assert_lit(look_at(tab), index, rectangle)
    tab.mouse.move(0, 0)
    assert_as_it_is(look_at(tab))


@pytest.mark.slow
def test_a_word_tells_its_figures_and_the_likeliest_alternatives_first(visit):
    tab = visit()
    choose(tab, to_file())
    assert tab.locator(".figures").is_hidden()
    tab.locator(".word").nth(1).hover()
    expected = (
        "61% likely · brightest spot: 49.0 × average attention · 25% from the picture\n"
        "instead: cat (37%), puppy (14%), 2 (5%)"
    )
    assert tab.locator(".figures").inner_text() == expected
    described = tab.locator(".word").nth(1).get_attribute("aria-describedby")
    assert tab.locator(f"#{described}").inner_text() == expected


@pytest.mark.slow
def test_light_stays_between_words_and_at_the_one_that_was_clicked(visit):
    tab = visit()
    choose(tab, to_file())
    word = tab.locator(".word").nth(1)
    word.hover()
    box = word.bounding_box()
    tab.mouse.move(box["x"] - 2, box["y"] + box["height"] / 2)  # the space before it
    assert_lit(look_at(tab), 1)
    word.click()
    tab.locator(".word").nth(3).hover()
    assert_lit(look_at(tab), 3)
    tab.mouse.move(0, 0)
    assert_lit(look_at(tab), 1)


@pytest.mark.slow
def test_light_passes_smoothly_to_where_it_belongs(visit):
    tab = visit(reduced_motion="no-preference")
    choose(tab, to_file())
    tab.locator(".word").nth(0).hover()
    tab.locator(".word").nth(3).hover()
    tab.wait_for_timeout(400)
    assert_lit(look_at(tab), 3)
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(400)
    assert_as_it_is(look_at(tab))


@pytest.mark.slow
def test_a_tap_lights_a_word(visit):
    tab = visit(360, has_touch=True, is_mobile=True)
    choose(tab, to_file())
    for index in (2, 1):
        tab.locator(".word").nth(index).tap()
        assert_lit(look_at(tab), index)


@pytest.mark.slow
def test_the_keyboard_alone_goes_from_the_start_to_the_copied_text_and_on(visit):
    tab = visit()
    press = tab.keyboard.press
    tab.on("filechooser", lambda chooser: chooser.set_files(to_file()))
    press("Tab")
    tab.locator("#choose:focus").wait_for(state="attached")
    press("Enter")
    wait_for(tab, 1)
    press("Tab")
    tab.locator("#as-sentences:focus").wait_for(state="attached")
    ways = [
        ("Tab", "a"),
        ("Tab", "dog"),
        ("ArrowRight", "'s"),
        ("ArrowLeft", "dog"),
        ("Home", "a"),
        ("End", "ball"),
    ]
    for key, word in ways:
        press(key)
        assert tab.locator(":focus").text_content() == word
        assert tab.locator(".lit").text_content() == word
    assert_lit(look_at(tab), 3)
    assert tab.locator(":focus").evaluate("word => getComputedStyle(word).outlineStyle") == "solid"
    press("Tab")
    assert_as_it_is(look_at(tab))
    press("Enter")
    tab.get_by_role("button", name="Copied").wait_for()
    assert said(tab) == "Copied: A dog's ball."
    assert tab.evaluate("navigator.clipboard.readText()") == "A dog's ball."
    reached = []
    for _ in range(5):
        press("Tab")
        reached.append(tab.locator(":focus").text_content())
    assert reached == ["Edit", "Save PNG", "Remove", "Other captions", "API"]
    press("Tab")
    assert tab.locator(":focus").count() == 0  # no trap: it has left the page


@pytest.mark.slow
def test_text_is_copied_without_a_clipboard_of_pages_too(visit):
    tab = visit(script="delete Navigator.prototype.clipboard")
    choose(tab, to_file())
    tab.get_by_role("button", name="Copy", exact=True).click()
    tab.get_by_role("button", name="Copied").wait_for()
    assert tab.evaluate("getSelection().toString()") == "a dog's ball"
    tab.set_content("<textarea></textarea>")
    tab.locator("textarea").press("Control+V")
    assert tab.locator("textarea").input_value() == "A dog's ball."


def test_a_picture_can_be_pasted(visit):
    tab = visit()
    content = base64.b64encode(to_file()["buffer"]).decode()
    tab.evaluate(
        """async content => {
          const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
          const picture = new Blob([bytes], {type: "image/png"});
          await navigator.clipboard.write([new ClipboardItem({"image/png": picture})]);
        }""",
        content,
    )
    tab.keyboard.press("Control+V")
    wait_for(tab, 1)
    assert captions_of(tab) == ["a dog's ball"]


@pytest.mark.slow
def test_pasting_text_says_that_it_is_no_picture(visit):
    tab = visit()
    tab.evaluate("navigator.clipboard.writeText('dog')")
    tab.keyboard.press("Control+V")
    tab.get_by_text("There is no picture to paste.").wait_for()
    assert tab.locator(".card").count() == 0


@pytest.mark.slow
def test_pictures_can_be_dropped_anywhere(visit, tmp_path):
    tab = visit()
    paths = [tmp_path / name for name in ("one.png", "two.png")]
    for path in paths:
        path.write_bytes(to_file()["buffer"])
    session = tab.context.new_cdp_session(tab)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 30, "y": 700, "data": data})
        if kind == "dragOver":
            assert tab.locator(".dropping").count() == 1
    wait_for(tab, 2)
    assert tab.locator(".dropping").count() == 0
    assert tab.locator("h2").all_text_contents() == ["one.png", "two.png"]
    assert captions_of(tab) == ["a dog's ball"] * 2


@pytest.mark.slow
def test_pictures_are_captioned_one_after_another_and_stand_in_the_order_in_which_they_came(visit):
    tab = visit()
    under_way, most = set(), []
    tab.on("request", lambda request: under_way.add(request) if request.method == "POST" else None)
    tab.on("request", lambda _: most.append(len(under_way)))
    tab.on("requestfinished", lambda request: under_way.discard(request))
    choose(tab, to_file("1.png"))
    choose(tab, *(to_file(f"{number}.png") for number in (2, 3, 4)))
    assert tab.locator("h2").all_text_contents() == ["1.png", "2.png", "3.png", "4.png"]
    assert captions_of(tab) == ["a dog's ball"] * 4
    assert max(most) == 1
    tab.locator(".card").nth(1).locator(".word").nth(3).hover()
    assert_lit(look_at(tab, 1), 3)
    assert_as_it_is(look_at(tab, 0))


@pytest.mark.slow
def test_another_candidate_becomes_the_caption_with_its_own_words_and_maps(visit):
    tab = visit()
    choose(tab, to_file())
    tab.get_by_text("Other captions").click()
    choices = tab.get_by_role("radio")
    assert tab.locator(".candidate").all_inner_texts() == ["a dog's ball", "two cats", "one <b> cat"]
    assert choices.nth(0).is_checked()
    choices.nth(1).check()
    assert captions_of(tab) == ["two cats"]
    assert said(tab) == "dog.png: two cats"
    assert tab.get_by_role("img", name="two cats").is_visible()
    tab.locator(".word").nth(1).hover()
    assert_lit(look_at(tab), 1)
    tab.get_by_role("button", name="Copy", exact=True).click()
    tab.get_by_role("button", name="Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == "Two cats."
    choices.nth(0).check()
    assert captions_of(tab) == ["a dog's ball"]


def test_all_captions_are_copied_and_saved_as_text_and_as_a_table(visit):
    tab = visit()
    choose(tab, to_file('a "b", c.png'))
    assert tab.locator("#together").is_hidden()  # one picture has buttons of its own
    choose(tab, to_file("dog.png"), {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    tab.complaints.clear()  # of the file that is no picture
    assert tab.locator("#count").text_content() == "2 of 3 captioned, 1 failed"
    tab.get_by_role("button", name="Copy all").click()
    tab.get_by_role("button", name="Copied").wait_for()
    lines = "a \"b\", c.png\tA dog's ball.\ndog.png\tA dog's ball.\n"
    assert tab.evaluate("navigator.clipboard.readText()") == lines
    table = 'image,caption\r\n"a ""b"", c.png",A dog\'s ball.\r\ndog.png,A dog\'s ball.\r\n'
    for button, name, content in (("text", "captions.txt", lines), ("CSV", "captions.csv", table)):
        with tab.expect_download() as saving:
            tab.get_by_role("button", name=f"Save as {button}").click()
        assert saving.value.suggested_filename == name
        assert Path(saving.value.path()).read_bytes().decode("utf-8-sig") == content


def test_a_sentence_can_be_edited_before_it_is_copied_and_saved(visit):
    tab = visit()
    choose(tab, to_file(), to_file("2.png"))
    card = tab.locator(".card").first
    card.get_by_role("button", name="Edit").click()
    field = tab.get_by_role("textbox", name="Alt text of dog.png")
    assert field.input_value() == "A dog's ball."
    assert field.evaluate("field => field == document.activeElement")
    field.fill("  The ball\nof a dog. ")
    assert tab.get_by_role("img", name="The ball of a dog.").is_visible()
    assert captions_of(tab)[0] == "a dog's ball"  # what the network wrote, with its light, stays
    card.locator(".word").nth(1).hover()
    assert_lit(look_at(tab), 1)
    for button, expected in (
        (card.get_by_role("button", name="Copy", exact=True), "The ball of a dog."),
        (tab.get_by_role("button", name="Copy all"), "dog.png\tThe ball of a dog.\n2.png\tA dog's ball.\n"),
    ):
        button.click()
        tab.wait_for_function("text => navigator.clipboard.readText().then(found => found == text)", arg=expected)
    card.get_by_role("button", name="Undo edits").click()
    assert field.is_hidden()
    assert tab.get_by_role("img", name="A dog's ball.").count() == 2
    card.get_by_role("button", name="Edit").click()
    field.fill("Mine")
    card.get_by_text("Other captions").click()
    card.get_by_role("radio").nth(1).check()
    assert field.is_hidden()
    assert tab.get_by_role("img", name="Two cats.").is_visible()


def test_a_caption_is_copied_as_a_sentence_or_as_it_is(visit):
    tab = visit()
    choose(tab, to_file(), to_file("2.png"))
    tab.get_by_role("checkbox", name="capital letter").uncheck()
    assert tab.get_by_role("img", name="a dog's ball", exact=True).count() == 2
    tab.get_by_role("button", name="Copy all").click()
    expected = "dog.png\ta dog's ball\n2.png\ta dog's ball\n"
    tab.wait_for_function("text => navigator.clipboard.readText().then(found => found == text)", arg=expected)


class Repetitive(Scripted):
    sentences = ("a dog runs", "the dog runs", "a dog on the grass", "dog on a grass", "a dog that runs on sand")


def test_only_captions_that_say_something_new_are_offered(visit, tiny):
    tab = visit(captioner=Repetitive(tiny.engine, tiny.header))
    choose(tab, to_file())
    tab.get_by_text("Other captions").click()
    texts = tab.locator(".candidate").all_text_contents()
    assert texts == [Repetitive.sentences[number] for number in (0, 2, 4)]


def test_the_empty_page_offers_a_picture_to_try(visit):
    tab = visit()
    example = tab.get_by_role("button", name="Try an example")
    assert example.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    example.click()
    wait_for(tab, 1)
    assert tab.locator("h2").all_text_contents() == ["example.jpg"]
    assert captions_of(tab) == ["a dog's ball"]
    assert example.is_hidden()
    tab.get_by_role("button", name="Remove").click()
    assert example.is_visible()


def save(tab, button):
    with tab.expect_download() as saving:
        button.click()
    return saving.value.suggested_filename, Path(saving.value.path())


def test_the_picture_is_saved_lit_for_each_word(visit):
    tab = visit()
    choose(tab, to_file())
    name, path = save(tab, tab.get_by_role("button", name="Save PNG"))
    assert name == "dog-words.png"
    sheet = Image.open(path).convert("RGB")
    assert sheet.size == (4 * (320 + 16) + 16, 320 + 40 + 2 * 16)
    for index in range(4):
        left = 16 + index * (320 + 16)
        panel = sheet.crop((left, 16, left + 320, 16 + 320)).resize((70, 70))
        assert_lit(np.asarray(panel)[10:60, 10:60].astype(int), index)
        word = np.asarray(sheet.crop((left, 16 + 320, left + 320, 16 + 320 + 40)))
        assert word.min() < 100 < word.max()


@pytest.mark.slow
def test_texts_and_pictures_of_all_are_saved_together(visit):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    tab = visit()
    choose(
        tab, to_file("dog.jpeg", (400, 100), exif=exif), to_file("Dog.png"), to_file("scan.tiff"), to_file("né.png")
    )
    name, path = save(tab, tab.get_by_role("button", name="Save as ZIP"))
    assert name == "captions.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        texts = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".txt")}
        sheets = {name: Image.open(archive.open(name)).size for name in archive.namelist() if name.endswith(".png")}
    stems = ["dog", "Dog.png", "scan", "né"]
    assert texts == {f"{stem}.txt": "A dog's ball.\n" for stem in stems}
    assert list(sheets) == [f"{stem}-words.png" for stem in stems if stem != "scan"]  # the browser shows no TIFF
    assert sheets["dog-words.png"] == (4 * (160 + 16) + 16, 320 + 40 + 2 * 16)
    assert tab.locator(".card").nth(2).get_by_role("button", name="Save PNG").count() == 0


@pytest.mark.slow
def test_all_pictures_are_removed_once_that_is_confirmed(visit):
    tab = visit()
    choose(tab, to_file("1.png"), to_file("2.png"))
    asked = []
    tab.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    tab.get_by_role("button", name="Remove all").click()
    assert tab.locator(".card").count() == 2
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="Remove all").click()
    assert asked == ["Remove all pictures and their captions from this page?"]
    assert tab.locator(".card").count() == 0
    assert tab.locator("#together").is_hidden()
    assert tab.locator("#choose").evaluate("input => input == document.activeElement")
    choose(tab, to_file("3.png"))
    assert captions_of(tab) == ["a dog's ball"]


@pytest.mark.slow
def test_a_page_with_captions_is_not_left_without_asking(visit):
    tab = visit()
    asked = []
    tab.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    tab.get_by_role("heading").click()  # browsers ask only after somebody has done something
    tab.reload()
    assert asked == []
    choose(tab, to_file())
    tab.get_by_role("heading", level=1).click()
    tab.reload()
    assert asked == ["beforeunload"]
    assert tab.locator(".card").count() == 0


@pytest.mark.slow
def test_the_page_says_that_captions_may_be_wrong_before_and_beside_them(visit):
    tab = visit(360)
    assert tab.get_by_text("often wrong in part").is_visible()
    choose(tab, to_file())
    assert tab.get_by_text("often wrong in part").is_visible()


@pytest.mark.slow
def test_the_words_of_the_page_fit_fingers_where_there_is_no_mouse(visit):
    for touch, hint in ((False, "Point at a word"), (True, "Tap a word")):
        tab = visit(360, has_touch=touch, is_mobile=touch)
        assert tab.get_by_text("drop them anywhere").is_visible() != touch
        choose(tab, to_file())
        assert tab.locator(".hint").inner_text().startswith(hint)


@pytest.mark.slow
def test_text_of_files_and_of_the_server_never_becomes_markup(visit):
    tab = visit()
    name = '<img src=x onerror="document.title = 1">.png'
    choose(tab, to_file() | {"name": name})
    assert tab.locator("h2").text_content() == name
    tab.get_by_text("Other captions").click()
    tab.get_by_role("radio").nth(2).check()
    assert captions_of(tab) == ["one <b> cat"]
    assert tab.locator(".card b, .card h2 *, #said img").count() == 0


def test_an_unreadable_file_costs_one_line_and_the_others_go_on(visit):
    tab = visit(is_failing=True)
    choose(tab, {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}, to_file())
    problem = tab.locator("[data-state=failed] .state").text_content()
    assert "unknown format" in problem
    assert tab.locator("[data-state=failed] .picture").is_hidden()
    assert tab.get_by_role("button", name="Try again").count() == 0
    assert captions_of(tab) == ["", "a dog's ball"]


@pytest.mark.slow
def test_a_file_that_is_too_large_is_refused_before_it_is_sent(visit, tmp_path):
    tab = visit()
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    posts = []
    tab.on("request", lambda request: posts.append(request) if request.method == "POST" else None)
    tab.set_input_files("#choose", path)
    wait_for(tab, 1)
    expected = "This file is too large: 95.4 MB, and the server takes up to 8 MB. Make the picture smaller."
    assert tab.locator(".state").text_content() == expected
    assert said(tab) == f"large.jpg: {expected}"
    assert posts == []


@pytest.mark.slow
def test_a_busy_server_is_asked_again_after_the_time_that_it_names(visit):
    tab = visit(is_failing=True)
    asked = []

    def answer(route):
        asked.append(time.monotonic())
        if len(asked) > 1:
            return route.continue_()
        return route.fulfill(status=503, headers={"Retry-After": "1"}, body='{"detail": "busy"}')

    tab.route("**/api/caption**", answer)
    tab.set_input_files("#choose", [to_file()])
    tab.get_by_text("The server is busy. Trying again in 1 s …").wait_for()
    wait_for(tab, 1)
    assert captions_of(tab) == ["a dog's ball"]
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 1


@pytest.mark.slow
def test_a_server_that_stays_busy_is_left_alone_in_the_end(visit):
    tab = visit(is_failing=True)
    tab.clock.install()
    asked = []

    def answer(route):
        asked.append(route)
        route.fulfill(status=503, body='{"detail": "too many pictures"}')

    tab.route("**/api/caption**", answer)
    tab.set_input_files("#choose", [to_file()])
    for _ in range(100):  # the page may not have its answer yet when the clock goes on
        tab.locator("[data-state=waiting], [data-state=failed]").wait_for()
        if tab.locator("[data-state=failed]").count():
            break
        tab.clock.run_for(1000)
        tab.wait_for_timeout(50)
    tab.locator("[data-state=failed]").wait_for()
    assert tab.locator(".state").text_content() == "too many pictures"
    assert len(asked) == TRIES


@pytest.mark.slow
def test_without_its_server_the_page_says_so_and_can_try_again(visit):
    tab = visit(is_failing=True)
    tab.route("**/api/caption**", lambda route: route.abort())
    choose(tab, to_file())
    assert tab.locator(".state").text_content() == "The server cannot be reached. Is it still running?"
    tab.unroute("**/api/caption**")
    tab.get_by_role("button", name="Try again").click()
    tab.locator("[data-state=captioned]").wait_for()
    assert captions_of(tab) == ["a dog's ball"]


@pytest.mark.slow
def test_pictures_are_captioned_in_their_order_though_a_later_one_is_ready_first(visit):
    tab = visit(
        script="""
            const read = Blob.prototype.arrayBuffer;
            Blob.prototype.arrayBuffer = function () {
              Blob.prototype.arrayBuffer = read;
              return new Promise((resolve) => (window.goOn = () => resolve(read.call(this))));
            };
        """
    )
    asked = []
    tab.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    tab.set_input_files("#choose", [to_file("1.png"), to_file("2.png")])
    first, second = (tab.locator(".card", has_text=name) for name in ["1.png", "2.png"])
    second.locator("img[src]").wait_for()
    assert [card.get_attribute("data-state") for card in (first, second)] == ["waiting", "waiting"]
    tab.evaluate("goOn()")
    wait_for(tab, 2)
    assert captions_of(tab) == 2 * ["a dog's ball"]
    assert asked.count("limits") == 1


@pytest.mark.slow
def test_a_picture_that_is_removed_keeps_none_waiting(visit):
    tab = visit()
    held = []
    tab.route("**/api/caption**", lambda route: held.append(route) if not held else route.continue_())
    with tab.expect_request("**/api/caption**"):
        tab.set_input_files("#choose", [to_file("1.png"), to_file("2.png")])
    while not held:
        tab.wait_for_timeout(10)
    tab.locator(".card", has_text="1.png").get_by_role("button", name="Remove").click()
    assert tab.locator(":focus").text_content() == "Remove"
    wait_for(tab, 1)
    assert tab.locator("h2").all_text_contents() == ["2.png"]
    assert captions_of(tab) == ["a dog's ball"]
    tab.get_by_role("button", name="Remove").click()
    assert tab.locator("#choose").evaluate("input => input == document.activeElement")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["turned.jpeg", "turned.png"])
def test_a_photograph_taken_sideways_is_lit_upright(visit, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    tab = visit()
    choose(tab, to_file(name, size=(400, 200), exif=exif))
    assert tab.locator(".picture img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [200, 400]
    tab.locator(".word").nth(2).hover()
    assert_lit(look_at(tab), 2, (0, 0.25, 1, 0.75))


@pytest.mark.slow
def test_a_picture_that_the_browser_cannot_show_has_its_caption_all_the_same(visit):
    tab = visit()
    choose(tab, to_file("scan.tiff", size=(400, 200)))
    assert captions_of(tab) == ["a dog's ball"]
    assert tab.get_by_text("This browser cannot show pictures of this kind.").is_visible()
    box = tab.locator(".picture").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("size", [(300, 300), *(pytest.param(size, marks=pytest.mark.slow) for size in LONG)])
def test_a_narrow_window_never_scrolls_sideways(visit, size):
    tab = visit(360)

    def lengthen(route):
        reply = json.loads(route.fetch().body())
        reply["words"][1] = "x" * 100
        reply["caption"] = reply["caption"].replace("dog", "x" * 100)
        reply["alternatives"][1] = {"y" * 100: -1}
        reply["candidates"][0]["caption"] = "z" * 100
        route.fulfill(json=reply)

    tab.route("**/api/caption**", lengthen)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    choose(tab, to_file("w" * 200 + ".png", size=size))
    tab.get_by_text("Other captions").click()
    tab.locator(".word").nth(1).hover()
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    for part in (".word", ".figures", ".candidate", "button"):
        for box in (element.bounding_box() for element in tab.locator(part).all()):
            assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 360)


@pytest.mark.slow
def test_the_page_is_dark_where_the_system_is(visit):
    tab = visit(color_scheme="dark")
    choose(tab, to_file())
    for part in ("body", ".card", ".candidates"):
        colours = tab.locator(part).evaluate(
            "part => [getComputedStyle(part).color, getComputedStyle(part).backgroundColor]"
        )
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert ink > 600
        assert paper < 120


def test_the_page_and_the_overlays_have_one_palette_and_one_light():
    style = (STATIC / "page.css").read_text()
    palettes = [re.findall(r"--(paper|card|ink|faint|rule|accent|mark|grey): (#\w+)", css) for css in
                (style, overlay_page.STYLE)]  # fmt: skip
    assert len(palettes[0]) == 16
    assert palettes[0] == palettes[1]
    for name in ("DIMMED", "VEIL", "FULL", "SOFTNESS", "SPREAD"):
        assert f"const {name} = {getattr(overlay, name)};" in (STATIC / "light.js").read_text()


def test_the_page_holds_no_script_no_style_and_no_address_of_elsewhere():
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    for file in STATIC.iterdir():
        addresses = re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", file.read_text())
        assert [address for address in addresses if urlsplit(address).hostname != "www.w3.org"] == []


class Doubtful(Scripted):
    """Says how far its sentences can be trusted."""

    def caption_prepared(self, pictures, settings):
        return [
            replace(
                make_caption(["a", "dog", "runs"], picture.rectangle),
                confidence=0.31,
                word_confidences=(None, 0.9, 0.2),
            )
            for picture in pictures
        ]


def test_unsure_words_are_marked_and_an_unsure_caption_says_so(visit, tiny, tmp_path):
    tab = visit(captioner=Doubtful(tiny.engine, tiny.header))
    file = tmp_path / "one.png"
    Image.new("RGB", (64, 64), GREEN).save(file)
    tab.set_input_files("input[type=file]", file)
    tab.locator(".card[data-state=captioned]").wait_for()
    classes = tab.locator(".caption .word").evaluate_all("words => words.map((word) => word.className)")
    assert classes == ["word sure", "word sure", "word unsure"]
    assert tab.locator(".trust").inner_text().strip() == "Unsure: 31% confident of all that it names."
    tab.locator(".word").nth(1).hover()
    assert tab.locator(".figures").inner_text().startswith("90% confident")
