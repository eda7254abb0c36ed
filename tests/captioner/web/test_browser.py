"""The scripts that caption in the browser give what the package gives: pixels, sentences, captions."""

import base64
import io
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from captioner import images
from captioner.captioning import load
from captioner.confidence import Calibration
from captioner.engine import AttentionMaps, StepResult
from captioner.images import ImageSettings
from captioner.model_file import FORMAT, Header
from captioner.network.checkpoint import save_checkpoint
from captioner.network.export import export_graphs
from captioner.network.model import build_network
from captioner.search import NoRepeatedPhrase, NoRepeatedWord, SearchSettings, search
from captioner.settings import AttentionSettings, DecoderSettings, EncoderSettings, ModelSettings
from captioner.vocabulary import END, PIECES_RULE, SPECIAL, START
from captioner.web.site import STATIC

ADDRESS = "https://captioner.test/"


@pytest.fixture
def tab(browser):
    """A blank page beside the scripts. `files` are served as well, by their path; nothing may complain."""
    context = browser.new_context()
    page = context.new_page()
    page.files = {"": b"<!DOCTYPE html><link rel=icon href=data:,>"}
    complaints = []

    def answer(route):
        path = route.request.url.removeprefix(ADDRESS)
        if path.startswith("static/"):
            route.fulfill(path=STATIC / path.removeprefix("static/"))
        elif isinstance(page.files[path], bytes):
            route.fulfill(body=page.files[path], content_type="text/html" if not path else "")
        else:
            route.fulfill(path=page.files[path])

    page.route("**/*", answer)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(ADDRESS)
    yield page
    context.close()
    assert complaints == []


def to_floats(text):
    return np.frombuffer(base64.b64decode(text), np.float32)


TO_TEXT = """
const toText = (floats) => new Promise((resolve) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.split(",")[1]);
  reader.readAsDataURL(new Blob([floats]));
});
"""


def to_levels(pixels, settings):
    """Return normalised pixels as 0 to 255."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (settings.mean, settings.std))
    return 255 * (pixels.reshape(3, settings.size, settings.size) * std + mean)


# Pictures of odd sizes

RANDOM = np.random.default_rng(0)
SIZES = [
    *((int(width), int(height)) for width, height in RANDOM.integers(1, 900, (36, 2))),
    *((1, 1), (2, 2), (1, 700), (700, 1), (3, 4000), (4000, 3), (224, 224), (223, 225), (224, 600), (600, 224)),
    *((1344, 1343), (672, 673), (448, 449), (2100, 1400)),
]


def prepare_in(tab, array, settings):
    height, width, _ = array.shape
    tab.files["picture"] = array.tobytes()
    return tab.evaluate(
        f"""async ([width, height, settings]) => {{
          {TO_TEXT}
          const {{ prepare }} = await import("/static/frame.js");
          const rgb = new Uint8Array(await (await fetch("/picture")).arrayBuffer());
          const data = new Uint8ClampedArray(4 * width * height);
          for (let at = 0; at < rgb.length; at++) data[at + Math.floor(at / 3)] = rgb[at];
          const {{ pixels, rectangle }} = prepare({{ width, height, data }}, settings);
          return {{ pixels: await toText(pixels), rectangle }};
        }}""",
        [width, height, asdict(settings)],
    )


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="earlier versions of Pillow round elsewhere")
def test_pictures_of_50_odd_sizes_are_resized_as_pillow_does(tab):
    for number, (width, height) in enumerate(SIZES):
        settings = ImageSettings(size=(224, 64, 97)[number % 3], frame=("stretch", "crop", "pad")[number // 3 % 3])
        array = RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected, rectangle = images.prepare(Image.fromarray(array), settings)
        found = prepare_in(tab, array, settings)
        assert found["rectangle"] == pytest.approx(rectangle)
        difference = np.abs(
            to_levels(to_floats(found["pixels"]) - expected.ravel(), replace(settings, mean=(0, 0, 0)))
        )
        assert difference.max() <= 1, (width, height, settings.frame)
    assert len(SIZES) == 50


def to_file(picture, kind, **options):
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def photograph(width, height):
    """Something smooth with edges, as photographs are."""
    small = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def orient(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


PICTURE = photograph(300, 200)
LAYER = PICTURE.copy()
LAYER.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
DEEP = Image.fromarray((np.asarray(PICTURE.convert("L"), np.uint16) << 8) + 99)
FILES = {
    **{f"turned-{number}.jpg": to_file(PICTURE, "JPEG", exif=orient(number)) for number in range(1, 9)},
    "turned.png": to_file(PICTURE, "PNG", exif=orient(6)),
    "turned.webp": to_file(PICTURE, "WEBP", exif=orient(8), lossless=True),
    "halved.jpg": to_file(photograph(1201, 901), "JPEG"),
    "quartered.jpg": to_file(photograph(1905, 2203), "JPEG", exif=orient(6)),
    "grey.jpg": to_file(PICTURE.convert("L"), "JPEG"),
    "cmyk.jpg": to_file(PICTURE.convert("CMYK"), "JPEG"),
    "progressive.jpg": to_file(PICTURE, "JPEG", progressive=True, subsampling=0),
    "palette.png": to_file(PICTURE.quantize(60), "PNG"),
    "transparent.png": to_file(LAYER, "PNG"),
    "16-bit.png": to_file(DEEP, "PNG"),
    "animated.gif": to_file(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
    "plain.bmp": to_file(PICTURE, "BMP"),
    "lossy.webp": to_file(PICTURE, "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_all_kinds_give_the_frame_that_the_package_gives(tab, name):
    settings = ImageSettings()
    tab.files["picture"] = FILES[name]
    expected, rectangle, size = images.open_frame(FILES[name], settings)
    found = tab.evaluate(
        f"""async (settings) => {{
          {TO_TEXT}
          const {{ readFrame }} = await import("/static/frame.js");
          const frame = await readFrame(await (await fetch("/picture")).blob(), settings);
          return {{ ...frame, pixels: await toText(frame.pixels) }};
        }}""",
        asdict(settings),
    )
    assert (found["width"], found["height"]) == size
    assert found["rectangle"] == list(rectangle)
    difference = np.abs(to_levels(to_floats(found["pixels"]), settings) - to_levels(expected, settings))
    assert difference.max() <= 3  # of 255: decoders round, and weigh colours, each in their way
    assert difference.mean() <= 0.6


# Search

VOCABULARY = 40


class Chain:
    """A network that predicts from the last word and the position alone, by tables."""

    def __init__(self, seed, spread):
        random = np.random.default_rng(seed)
        logits = random.normal(0, spread, (VOCABULARY, VOCABULARY)).astype(np.float32)
        logits[:, 5] = logits[:, 6]  # words that are as likely as others: their order must be the same
        self.table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        weights = random.random((VOCABULARY, 4)).astype(np.float32)
        self.attention = weights / weights.sum(axis=1, keepdims=True)
        self.visual = random.random(VOCABULARY).astype(np.float32)

    def step(self, words, state):
        return StepResult(self.table[words], state, AttentionMaps(self.attention[words], self.visual[words]))

    def select(self, images, rows):  # as a state, which knows nothing
        return self

    def to_json(self):
        return {name: getattr(self, name).astype(float).tolist() for name in ("table", "attention", "visual")}


SEARCHES = [
    SearchSettings(),
    SearchSettings(candidates=5, alternatives=3),
    SearchSettings(beam_size=1),
    SearchSettings(beam_size=7, candidates=7, max_words=4, repeat_size=0, bar_repeats=False),
    SearchSettings(min_words=6, length_penalty=0, candidates=3),
    SearchSettings(length_penalty=2, max_words=9, candidates=4, coverage_penalty=0.7),
    SearchSettings(diverse_groups=3, beam_size=6, candidates=6, diversity=1.5),
    SearchSettings(diverse_groups=5, beam_size=5, candidates=5, max_words=5, alternatives=2),
    SearchSettings(max_words=1, candidates=5),
    SearchSettings(min_words=8, max_words=8, candidates=5, repeat_size=2),
    SearchSettings(require=("12",), candidates=5),
    SearchSettings(require=("12", "7", "30"), beam_size=3, candidates=3, max_words=6, alternatives=2),
    SearchSettings(require=("31", "20"), beam_size=2, candidates=2, max_words=2),
]

SEARCH = """async ([chain, settings, alternatives, once, repeatable, required]) => {
  const { search, noRepeatedPhrase, noRepeatedWord } = await import("/static/beam.js");
  const toRows = (table, words) => {
    const rows = words.map((word) => [table[word]].flat());
    return { data: Float32Array.from(rows.flat()), width: rows[0].length };
  };
  const engine = {
    select: (state) => state,
    step: async (words, state) => ({
      logProbs: toRows(chain.table, words),
      state,
      look: { attention: toRows(chain.attention, words), visual: toRows(chain.visual, words) },
    }),
  };
  const constraints = [];
  if (settings.bar_repeats) constraints.push(noRepeatedWord(once));
  if (settings.repeat_size) constraints.push(noRepeatedPhrase(settings.repeat_size, repeatable));
  const found = await search(engine, {}, settings, { start: 1, end: 2, constraints, required, alternatives });
  return found.map((each) => ({ ...each, attention: each.attention.map((map) => Array.from(map)) }));
}"""


@pytest.mark.parametrize("settings", SEARCHES)
@pytest.mark.parametrize("spread", [1, 4])
def test_searches_find_the_sentences_that_the_package_finds(tab, settings, spread):
    once, repeatable = list(range(10, 30)), [7, 8]
    for seed in range(8):
        chain = Chain(seed, spread)
        constraints = [NoRepeatedWord(once)] if settings.bar_repeats else []
        constraints += [NoRepeatedPhrase(settings.repeat_size, repeatable)] if settings.repeat_size else []
        required = [int(word) for word in settings.require]
        more = settings.alternatives and settings.alternatives + 5
        (expected,) = search(
            chain.step,
            chain,
            1,
            settings,
            start=START,
            end=END,
            constraints=constraints,
            required=required,
            alternatives=more,
            ending_earlier=True,
        )
        found = tab.evaluate(SEARCH, [chain.to_json(), asdict(settings), more, once, repeatable, required])
        assert [sentence["words"] for sentence in found] == [hypothesis.words for hypothesis in expected]
        for sentence, hypothesis in zip(found, expected, strict=True):
            assert sentence["score"] == pytest.approx(hypothesis.score, abs=1e-6)
            assert sentence["logProb"] == pytest.approx(hypothesis.log_prob, abs=1e-6)
            assert sentence["logProbs"] == pytest.approx(hypothesis.log_probs, abs=1e-6)
            assert sentence["attention"] == pytest.approx(hypothesis.attention, abs=1e-7)
            assert sentence["visual"] == pytest.approx(hypothesis.visual, abs=1e-7)
            if more:
                assert [
                    [other["id"] for other in word] for word in sentence["alternatives"]
                ] == hypothesis.alternatives.ids.tolist()


def test_the_scripts_have_the_defaults_of_the_search_settings(tab):
    found = tab.evaluate("async () => (await import('/static/beam.js')).DEFAULTS")
    defaults = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(SearchSettings()).items()
    }
    for drawing in ("temperature", "top_k", "top_p", "seed"):
        del defaults[drawing]
    assert found == defaults


def test_a_prediction_that_is_no_number_is_an_error(tab):
    with pytest.raises(Exception, match="not numbers"):
        tab.evaluate("async () => (await import('/static/beam.js')).topK(new Float32Array([-1, NaN, -2]), 2)")


# Networks

LOAD = """async () => {
  const runtime = await import("/runtime/ort.wasm.min.mjs");
  Object.assign(runtime.env.wasm, { wasmPaths: new URL("/runtime/", location).href, numThreads: 1 });
  const { Captioner } = await import("/static/captioner.js");
  const { ModelFile } = await import("/static/model.js");
  const { Engine } = await import("/static/engine.js");
  const file = await (await fetch("/model.safetensors")).arrayBuffer();
  window.captioner = await Captioner.load(file, runtime);
  window.engine = await Engine.load(new ModelFile(file), runtime);
}"""

CAPTION_PIXELS = """async ([rectangle, settings]) => {
  const pixels = new Float32Array(await (await fetch("/pixels")).arrayBuffer());
  return captioner.captionPixels(pixels, rectangle, settings);
}"""


@pytest.fixture
def loaded(tab, onnxruntime_web):
    """Load a model file in the page, and return the page and the package's captioner."""

    def loaded(checkpoint):
        tab.files |= {f"runtime/{file.name}": file for file in (onnxruntime_web / "dist").iterdir()}
        tab.files["model.safetensors"] = checkpoint
        tab.evaluate(LOAD)
        return SimpleNamespace(tab=tab, captioner=load(checkpoint, engine="onnx", threads=1))

    return loaded


def draw_pixels(count, size):
    """Frames that differ: noise on colours."""
    random = np.random.default_rng(3)
    return (random.normal(0, 1, (count, 3, size, size)) + random.normal(0, 2, (count, 3, 1, 1))).astype(np.float32)


@pytest.fixture(scope="session")
def odd_checkpoints(tmp_path_factory):
    """Model files of other networks, by a name: with pieces, several heads, a sentinel, a memory of attention."""
    kinds = {
        "adaptive": (
            AttentionSettings(kind="adaptive", size=8),
            DecoderSettings(hidden_size=16, embedding_size=12),
        ),
        "entmax, coverage": (
            AttentionSettings(size=8, coverage=True, normalize="entmax15"),
            DecoderSettings(hidden_size=16, embedding_size=12),
        ),
        "transformer": (
            AttentionSettings(kind="multi_head", size=16, heads=4),
            DecoderSettings(kind="transformer", hidden_size=16, embedding_size=12),
        ),
    }
    pieces = (*SPECIAL, "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab", "ab</w>", "bc</w>", "ca", "cab</w>", "bb")
    merges = (("a", "b"), ("a", "b</w>"), ("b", "c</w>"), ("c", "a"), ("ca", "b</w>"), ("b", "b"))
    paths = {}
    for name, (attention, decoder) in kinds.items():
        torch.manual_seed(1)
        settings = ModelSettings(EncoderSettings("small_cnn", stride=8, grid=(2, 3)), attention, decoder)
        network = build_network(settings, len(pieces), 64)
        paths[name] = tmp_path_factory.mktemp("odd") / "model.safetensors"
        header = Header(FORMAT, settings, ImageSettings(size=64), pieces, PIECES_RULE, merges=merges)
        save_checkpoint(paths[name], network, header, graphs=export_graphs(settings, len(pieces), 64))
    return paths


def assert_equal_captions(model, count, settings):
    size = model.captioner.header.images.size
    rectangle = images.Rectangle(0, 0, 1, 1)
    for pixels in draw_pixels(count, size):
        prepared = SimpleNamespace(pixels=pixels, rectangle=rectangle)
        (expected,) = (
            caption.to_dict(attention=True) for caption in model.captioner.caption_prepared([prepared], settings)
        )
        model.tab.files["pixels"] = pixels.tobytes()
        found = model.tab.evaluate(CAPTION_PIXELS, [rectangle, asdict(settings)])
        candidates = zip([found, *found["candidates"]], [expected, *expected.get("candidates", [])], strict=True)
        for record, expected in candidates:
            assert record.keys() - {"candidates"} == expected.keys() - {"candidates"}
            for name in ("caption", "words"):
                assert record[name] == expected[name]
            for name in {
                "log_prob",
                "score",
                "log_probs",
                "visual",
                "confidence",
                "word_confidences",
            } & expected.keys():
                assert record[name] == pytest.approx(expected[name], abs=1e-3), name
            assert np.array(record["attention"]) == pytest.approx(np.array(expected["attention"]), abs=1e-4)
            assert [[*others] for others in record["alternatives"]] == [
                [*others] for others in expected["alternatives"]
            ]


ASKED = SearchSettings(candidates=4, alternatives=3, max_words=8)


def test_a_network_gives_the_captions_that_the_package_gives(loaded, tiny_checkpoint):
    assert_equal_captions(loaded(tiny_checkpoint), 8, ASKED)


def test_a_network_writes_required_words_and_no_banned_ones(loaded, tiny_checkpoint):
    model = loaded(tiny_checkpoint)
    banned, *required = model.captioner.header.words[len(SPECIAL) :][:3]
    assert_equal_captions(model, 2, replace(ASKED, ban=(banned,), require=tuple(required)))
    with pytest.raises(Exception, match='required word "none-such"'):
        model.tab.evaluate(CAPTION_PIXELS, [[0, 0, 1, 1], {"require": ["none-such"]}])


def test_a_calibrated_network_gives_the_confidence_that_the_package_gives(loaded, calibrated_checkpoint):
    model = loaded(calibrated_checkpoint)
    assert isinstance(model.captioner.header.calibration, Calibration)
    assert_equal_captions(model, 4, ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaptive", "entmax, coverage", "transformer"])
def test_networks_of_other_kinds_with_pieces_of_words_do_too(loaded, odd_checkpoints, kind):
    assert_equal_captions(loaded(odd_checkpoints[kind]), 4, ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "flickr8k"])
def test_the_shipped_networks_do_too(loaded, name):
    from captioner.model_file import SHIPPED

    model = loaded(SHIPPED[name])
    assert_equal_captions(model, 2, replace(model.captioner.search_settings, candidates=5, alternatives=3))


def test_first_predictions_are_those_of_the_package(loaded, tiny_checkpoint):
    model = loaded(tiny_checkpoint)
    (pixels,) = draw_pixels(1, 64)
    engine = model.captioner.engine
    expected = engine.step(np.array([[START]]), engine.start(pixels[None]))
    model.tab.files["pixels"] = pixels.tobytes()
    found = model.tab.evaluate(
        """async () => {
          const pixels = new Float32Array(await (await fetch("/pixels")).arrayBuffer());
          const { logProbs, look } = await engine.step([1], await engine.start(pixels));
          return [logProbs, look.attention].map(({ data }) => Array.from(data));
        }"""
    )
    assert found[0] == pytest.approx(expected.log_probs[0, 0], abs=1e-4)
    assert found[1] == pytest.approx(expected.maps.attention[0, 0], abs=1e-5)


@pytest.mark.slow
def test_98_of_100_development_photographs_get_the_caption_of_the_package(loaded, real_data):
    from captioner.model_file import SHIPPED

    folder = real_data / "flickr8k"
    names = (folder / "Flickr8k_text" / "Flickr_8k.devImages.txt").read_text().split()[:100]
    model = loaded(SHIPPED["default"])
    equal = 0
    for name in names:
        picture = folder / "Flicker8k_Dataset" / name
        expected = model.captioner.caption(picture).to_dict()
        model.tab.files["picture"] = picture
        found = model.tab.evaluate("async () => captioner.caption(await (await fetch('/picture')).blob())")
        if found["caption"] == expected["caption"]:
            equal += 1
            assert found["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-2)
    print(f"{equal} of {len(names)} captions are equal")
    assert equal >= 98


def test_search_settings_that_browsers_lack_are_an_error(tab):
    for header in ({"search": {"sample": True}}, {"search": {"require": ["dog"]}, "merges": [["a", "b"]]}):
        with pytest.raises(Exception, match="do not work in browsers"):
            tab.evaluate(
                f"async () => new (await import('/static/captioner.js')).Captioner({{}}, {json.dumps(header)})"
            )


UNREADABLE = {
    "text": (b"no picture", "cannot read this picture"),
    "TIFF": (to_file(PICTURE, "TIFF"), "cannot read this picture"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "cannot read this picture"),
    "cut off JPEG": (FILES["turned-1.jpg"][:-99], "is cut off"),
    "cut off progressive JPEG": (FILES["progressive.jpg"][:-99], "is cut off"),
    "cut off PNG": (FILES["turned.png"][:-9999], "cannot read this picture"),
    "cut off WebP": (FILES["lossy.webp"][:-999], "cannot read this picture"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_are_no_pictures_are_told_in_one_line(tab, name):
    tab.files["picture"], problem = UNREADABLE[name]
    with pytest.raises(Exception, match=problem):
        tab.evaluate(
            """async () => (await import("/static/frame.js")).readFrame(await (await fetch("/picture")).blob(),
            { size: 8, frame: "stretch", mean: [0, 0, 0], std: [1, 1, 1] })"""
        )


def test_files_that_are_no_models_are_told_in_one_line(tab):
    with pytest.raises(Exception, match="model file is damaged"):
        tab.evaluate("async () => new (await import('/static/model.js')).ModelFile(new ArrayBuffer(9))")


@pytest.mark.parametrize(
    ("run", "chosen"),
    [
        ("(pixels) => pixels.map((x) => 1.0005 * x)", ["webgpu", "webgpu"]),
        ("(pixels) => pixels.map((x) => 1.002 * x)", ["wasm", "wasm"]),
        ("(pixels) => pixels.fill(NaN)", ["wasm", "wasm"]),
        ("() => { throw new Error('no such operator'); }", ["wasm", "wasm"]),
        ("(pixels) => { if (runs.length > 2) throw new Error('lost'); return pixels; }", ["webgpu", "wasm"]),
        ("undefined", ["wasm", "wasm"]),  # there is no session at all
    ],
)
def test_webgpu_encodes_only_where_it_works_and_its_results_agree(tab, run, chosen):
    found, released = tab.evaluate(
        f"""async () => {{
          const {{ Engine }} = await import("/static/engine.js");
          const runs = [], released = [];
          const compute = {{ wasm: (pixels) => pixels, webgpu: {run} }};
          const runtime = {{
            Tensor: class {{ constructor(type, data) {{ this.data = data; }} }},
            InferenceSession: {{
              create: async (graph, {{ executionProviders: [provider] }}) => {{
                if (!compute[provider]) throw new Error("no session");
                return {{
                  run: async ({{ pixels }}) => {{
                    const data = compute[provider](pixels.data.slice());
                    runs.push(provider);
                    return {{ "image.annotations": {{ data }} }};
                  }},
                  release: async () => released.push(provider),
                }};
              }},
            }},
          }};
          const model = {{ header: {{ images: {{ size: 4 }} }}, readBytes: () => new Uint8Array(0) }};
          const engine = await Engine.load(model, runtime, true);
          const found = [];
          for (let picture = 0; picture < 2; picture++) {{
            await engine.start(new Float32Array(48));
            found.push(runs.at(-1));
          }}
          return [found, released];
        }}"""
    )
    assert found == chosen
    assert released == ([] if run == "undefined" or "webgpu" in chosen else ["webgpu"])
