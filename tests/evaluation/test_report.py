import html
import json
import re

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from captioner.search import SearchSettings
from evaluation.__main__ import main
from evaluation.bootstrap import intervals
from evaluation.metrics import Scorer
from evaluation.report import BINS, LONGEST, choose, count_lengths, count_scores, draw, draw_curve, round_step

pytestmark = pytest.mark.usefixtures("without_java")

MARKUP = "<script>alert(1)</script> \"quoted\" & 'so' https://example.org/a.png"

ALL = ("--pictures", "5")  # the best five and the worst five of nine or ten pictures


@pytest.fixture
def references(pictures):
    """Distinct references of nine pictures, by image id."""
    words = [
        "the dog runs",
        "a red ball",
        "a cat sleeps",
        "the blue ball",
        "a dog",
        "the cat 's ball",
        "red",
        "in",
        "on",
    ]
    return {path.name: [text, f"{text} in a house"] for path, text in zip(pictures, words, strict=True)}


@pytest.fixture
def write(tiny_checkpoint, pictures, references, tmp_path):
    """Write a report of the nine pictures with further options, and return it."""

    def write(*options, checkpoint=tiny_checkpoint):
        data, report = tmp_path / "captions.jsonl", tmp_path / "report.html"
        rows = [{"image": image, "captions": captions, "split": "dev"} for image, captions in references.items()]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["report", str(checkpoint), "--data", f"jsonl:{data}", "--device", "cpu", "-o", str(report)]
        assert main([*command, *options]) == 0
        return report.read_text(encoding="utf-8")

    return write


def names_in(page, gallery):
    """The file names of the pictures of a gallery, in their order."""
    (section,) = re.findall(rf'<section id="{gallery}">.*?</section>', page)
    return re.findall(r'<p class="name">(.*?)</p>', section)


def test_galleries_are_best_worst_and_seeded_random(write, tiny, pictures, references):
    page = write("--pictures", "3", "--seed", "1", "--beam-size", "2")
    captions = {path.name: tiny.caption(path, SearchSettings(beam_size=2)).text for path in pictures}
    scores = Scorer(references).score(captions).per_image["CIDEr-D"]
    ascending = sorted(scores.values())
    assert ascending[0] < ascending[-1]
    assert [scores[name] for name in names_in(page, "best")] == ascending[::-1][:3]
    assert [scores[name] for name in names_in(page, "worst")] == ascending[:3]
    assert len(set(names_in(page, "random"))) == 3
    assert names_in(page, "random") == choose(scores, 3, seed=1)["random"]
    assert len({tuple(choose(scores, 3, seed)["random"]) for seed in range(20)}) > 10


def test_the_scores_and_intervals_are_those_of_run(write, tiny, pictures, references):
    page = write("--pictures", "1")
    captions = {path.name: tiny.caption(path, SearchSettings(beam_size=5)).text for path in pictures}
    scores = Scorer(references).score(captions)
    for metric, value in scores.corpus.items():
        low, high = intervals(scores)[metric]
        cells = f'{metric}</th><td class="score">{100 * value:.1f}</td><td>{100 * low:.1f} to {100 * high:.1f}</td>'
        assert cells in page
    assert f"<td>{100 * scores.without_brevity_penalty['BLEU-4']:.1f}</td></tr>" in page
    assert "METEOR is unavailable: pycocoevalcap is not installed" in page
    assert "Objects" not in page


def test_each_picture_has_its_caption_references_and_scores(write, tiny, pictures, references):
    page = write(*ALL)
    captions = {path.name: tiny.caption(path, SearchSettings(beam_size=5)) for path in pictures}
    scores = Scorer(references).score({name: caption.text for name, caption in captions.items()}).per_image
    assert page.count("<figure") == 3 * 5
    for name, caption in captions.items():
        shown = re.findall(rf'<figure(?:(?!</figure>).)*"name">{name}<.*?</figure>', page)[0]
        assert f'alt="{html.escape(caption.text)}"' in shown
        assert shown.count('class="word"') == len(caption.words)
        for metric in ("CIDEr-D", "BLEU-4", "ROUGE-L"):
            assert f"<dt>{metric}</dt><dd>{100 * scores[metric][name]:.1f}</dd>" in shown
        for reference in references[name]:
            assert f">{escape(reference)}</li>" in shown


def test_markup_in_captions_and_names_is_escaped(write, references, tmp_path):
    name = "<b onclick='x'>&.png"
    Image.new("RGB", (50, 40), "red").save(tmp_path / name)
    references[name] = [MARKUP]
    page = write(*ALL)
    assert f">{escape(MARKUP)}</li>" in page
    assert f'<p class="name">{html.escape(name)}</p>' in page
    assert not re.findall(r"<script|<b |onclick='", page)


def test_the_report_loads_no_resources(write, references):
    references["picture-0.png"].append(MARKUP)
    page = write(*ALL)
    assert "https:" not in page.replace(escape(MARKUP), "")
    assert not re.findall(
        r"http:|//[a-z]|url\(|@import|<link|src=\"(?!data:)|href=\"(?!#)", page.split("<style>")[0]
    )
    assert not re.findall(r"url\(|@import|<link|src=\"(?!data:)|href=\"(?!#)", page)


def test_zero_pictures_show_no_gallery(write):
    page = write("--pictures", "0")
    assert "<figure" not in page
    assert "CIDEr-D" in page


def test_an_existing_report_is_replaced_only_with_overwrite(write, tiny_checkpoint, tmp_path, capsys):
    page = write("--pictures", "1")
    (tmp_path / "report.html").write_text("mine")
    command = ["report", "no-such-model", "--data", "jsonl:no-such-data", "-o", str(tmp_path / "report.html")]
    assert main(command) == 2  # fails before the missing files are read
    assert "report.html: exists already" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"
    assert write("--pictures", "1", "--overwrite") == page


def test_invalid_usage_leaves_no_file(tiny_checkpoint, tmp_path, capsys):
    data, report = tmp_path / "captions.jsonl", tmp_path / "report.html"
    command = ["report", str(tiny_checkpoint), "--data", f"jsonl:{data}", "-o", str(report)]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--pictures", "-1"])
    assert "argument --pictures: must be 0 to 10000, got -1" in capsys.readouterr().err
    assert main(command) == 2
    assert "captions.jsonl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_caption_is_in_one_bin_of_the_lengths():
    captions = ["a dog", "a dog runs.", "", "a b c", "word " * 90, "word " * LONGEST]
    found = count_lengths(captions, ["three words here"] * 7)
    assert found.counts["captions"].tolist() == [1, 0, 1, 2, *[0] * (LONGEST - 4), 2]
    assert found.counts["references"].tolist() == [0, 0, 0, 7, *[0] * (LONGEST - 3)]
    assert found.labels[3] == "3 words"


@pytest.mark.parametrize("highest", [0, 1e-12, 0.37, 1, 1 + 1e-9, 4.37, 10])
@pytest.mark.parametrize("metric", ["CIDEr-D", "BLEU-4"])
def test_every_picture_is_in_one_bin_of_the_scores(metric, highest):
    scores = [*np.random.default_rng(0).uniform(0, highest, 500).tolist(), 0.0, highest]
    found = count_scores(metric, scores)
    assert found.counts["pictures"].sum() == 502
    assert len(found.labels) == len(found.counts["pictures"]) == len(found.edges) - 1 <= BINS


def test_scores_fall_into_the_bins_that_hold_them():
    found = count_scores("BLEU-4", [0, 0.049, 0.051, 0.99, 1.0])
    assert found.labels[:2] == ["0 to 5", "5 to 10"]
    assert found.counts["pictures"].tolist() == [2, 1, *[0] * 17, 2]


@pytest.mark.parametrize(
    ("span", "most", "step"), [(100, 24, 5), (437, 24, 20), (26, 6, 5), (0.3, 4, 0.1), (8, 4, 2)]
)
def test_steps_are_round(span, most, step):
    assert round_step(span, most) == pytest.approx(step)


def test_bars_are_as_high_as_their_shares():
    chart = draw(count_lengths(["a dog"] * 3 + ["a dog runs"], ["a dog"] * 2))
    bars = re.findall(r'class="(series-\d)" d="M\S+ (\d+)V(\S+?)H.*?<title>(.*?)</title>', chart)
    heights = {title: int(bottom) - float(top) for _, bottom, top, title in bars}
    whole = heights["references, 2 words: 100.0% (2)"]
    assert heights["captions, 2 words: 75.0% (3)"] == pytest.approx(0.75 * whole, abs=0.2)
    assert heights["captions, 3 words: 25.0% (1)"] == pytest.approx(0.25 * whole, abs=0.2)
    assert 'role="img" aria-label="Length of captions. references: most often 2 words, 100.0%; captions' in chart


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_a_report_fits_the_window_of_a_browser(visit, write, references, width):
    references["picture-0.png"].append("x" * 200)
    tab = visit(write("--pictures", "4"), width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    tab.locator("#worst .word").first.hover()
    assert tab.locator("#worst .figures").first.is_visible()
    assert not tab.locator("#best .figures").first.is_visible()


def test_a_calibrated_model_has_figures_and_charts_of_confidence(write, calibrated_checkpoint):
    page = write(*ALL, checkpoint=calibrated_checkpoint)
    assert re.search(r'<th scope="row">AUC, words</th><td class="score">[\d.]+</td><td>[\d.]+ to [\d.]+</td>', page)
    for title in ("Reliability, captions", "Reliability, things", "Captions that are not confirmed"):
        assert f"<h3>{title}</h3>" in page
    assert "Confidence" not in re.sub(r"<style>.*?</style>", "", write(*ALL, "--overwrite"), flags=re.S)


def test_a_curve_is_drawn_where_its_numbers_are():
    chart = draw_curve("T", "across", "up", [(0, 0), (0.5, 1), (1, 0.5)], diagonal=True)
    indices = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    (left, ground), (middle, top), (end, half) = indices
    assert middle == pytest.approx((left + end) / 2, abs=0.1)
    assert half == pytest.approx((ground + top) / 2, abs=0.1)
    assert f'd="M{left:g} {ground:g}L{end:g} {top:g}"' in chart  # the diagonal
    assert "across 50%: 100% up" in chart
