"""Our scores beside those of coco-caption itself (pycocoevalcap 1.2, its Java tokenizer included)."""

import contextlib
import io
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest

from evaluation.metrics import PYTHON_SCORES, Scorer
from evaluation.metrics.java import UnavailableError, find_program
from evaluation.tokenize import tokenize

BROKEN = {  # what captioners and users get wrong
    "whole": lambda text: text,
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "repeated": lambda text: f"{text} {text}",
    "upper case": str.upper,
    "punctuation": lambda text: f"({text.replace(' ', ', ')})... -- '{text}'?! & [50% = 1/2]; a.m. \"St. John's\"",
    "unicode": lambda text: f"“{text.replace('a', 'ä')}” – naïve café’s 日本語 ½ € … é\xa0ü №5",
    "markup": lambda text: f"<b>{text}</b> &amp; &quot;x&quot; <br/> <unk> <a href='#'>a dog</a> {{}} $1.50 a_b",
}

# Corpus scores by coco-caption itself, so that the comparison also holds where there is no Java.
EXPECTED = {
    ("coco", False): {
        "BLEU-1": 0.6289659392988846,
        "BLEU-2": 0.43256330862297276,
        "BLEU-3": 0.2895228583434931,
        "BLEU-4": 0.1922058344868111,
        "ROUGE-L": 0.4658472304889901,
        "CIDEr-D": 0.8719329380516683,
    },
    ("coco", True): {
        "BLEU-1": 0.3308390442674528,
        "BLEU-2": 0.2114456498219439,
        "BLEU-3": 0.1343501290472505,
        "BLEU-4": 0.08529309361740749,
        "ROUGE-L": 0.3087233516136033,
        "CIDEr-D": 0.29712966119654,
    },
    ("flickr8k", False): {
        "BLEU-1": 0.6459178532601404,
        "BLEU-2": 0.45793224650908737,
        "BLEU-3": 0.31648973766501265,
        "BLEU-4": 0.21665724459484037,
        "ROUGE-L": 0.4971579485625828,
        "CIDEr-D": 0.7964043643926667,
    },
    ("flickr8k", True): {
        "BLEU-1": 0.34242968385793165,
        "BLEU-2": 0.22635235522288025,
        "BLEU-3": 0.1479019280948732,
        "BLEU-4": 0.09603035414614934,
        "ROUGE-L": 0.32629619758561085,
        "CIDEr-D": 0.2718014187657871,
    },
}


@pytest.fixture(scope="module")
def coco_caption():
    """Score tokenized captions by pycocoevalcap."""
    try:
        find_program("tokenizer", "stanford-corenlp-3.4.1.jar")
    except UnavailableError as error:
        pytest.skip(f"coco-caption cannot run here: {error}")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def score(references, candidates):
        """Return tokens of both, corpus scores, and the scores of images in their order."""
        words = [
            PTBTokenizer().tokenize(
                {image: [{"caption": text} for text in texts] for image, texts in texts_of.items()}
            )
            for texts_of in (references, {image: [text] for image, text in candidates.items()})
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            found = [Bleu(4).compute_score(*words), Rouge().compute_score(*words), Cider().compute_score(*words)]
        (bleus, bleus_of_images), *rest = found
        corpus = dict(zip(PYTHON_SCORES, [*bleus, *(value for value, _ in rest)], strict=True))
        images = dict(zip(PYTHON_SCORES, [*bleus_of_images, *(values for _, values in rest)], strict=True))
        return *words, corpus, images

    return score


def leave_one_out(texts, broken):
    """Return references and candidates: of each image's captions one, broken in one of the ways or whole."""
    references, candidates = {}, {}
    for number, (image, several) in enumerate(texts.items()):
        rest = list(several)
        candidate = rest.pop(number % len(rest))
        change = list(BROKEN.values())[number % len(BROKEN)] if broken else BROKEN["whole"]
        references[image], candidates[image] = rest, change(candidate)
    return references, candidates


def read_captions(source):
    if "CAPTIONER_DATA" not in os.environ:
        pytest.skip("CAPTIONER_DATA names no folder of real captions")
    data = Path(os.environ["CAPTIONER_DATA"])
    texts = defaultdict(list)
    if source == "coco":
        content = json.loads((data / "coco/annotations/captions_val2017.json").read_text(encoding="utf-8"))
        for annotation in content["annotations"]:
            texts[annotation["image_id"]].append(annotation["caption"])
    else:
        for line in (data / "flickr8k/Flickr8k_text/Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
            name, caption = line.split("\t", 1)
            texts[name.split("#")[0]].append(caption)
    return texts


def assert_equal(coco_caption, references, candidates):
    wanted_references, wanted_candidates, corpus, images = coco_caption(references, candidates)
    for image, texts in references.items():
        pairs = zip(
            [*texts, candidates[image]], [*wanted_references[image], *wanted_candidates[image]], strict=True
        )
        for text, wanted in pairs:
            words = " ".join(tokenize(text))
            # Whether an initial that ends a caption keeps its full stop, coco-caption tells by the next caption.
            assert wanted in ((words, f"{words}.") if re.search(r"\b[A-Z]\.$", text) else (words,)), text
    scores = Scorer(references).score(candidates)
    assert scores.corpus == pytest.approx(corpus, abs=1e-9)
    for metric in PYTHON_SCORES:
        assert list(scores.per_image[metric].values()) == pytest.approx(list(images[metric]), abs=1e-9)
    return corpus


def test_broken_captions_score_as_by_coco_caption(coco_caption):
    whole = {
        number: [f"A {what} {does} {where}.", f"The {what} is {where}", f"some {what}s, {where}"]
        for number, (what, does, where) in enumerate(
            (what, does, where)
            for what in ("dog", "man's hat", "X-ray")
            for does in ("runs", "can't sit")
            for where in ("on the 1/2-pipe", "in St. John's Park")
        )
    }
    assert len(whole) > len(BROKEN)
    assert_equal(coco_caption, *leave_one_out(whole, broken=True))


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
@pytest.mark.parametrize("source", ["coco", "flickr8k"])
def test_scores_of_all_real_captions_are_those_that_coco_caption_gave(source, broken):
    references, candidates = leave_one_out(read_captions(source), broken)
    assert Scorer(references).score(candidates).corpus == pytest.approx(EXPECTED[source, broken], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
@pytest.mark.parametrize("source", ["coco", "flickr8k"])
def test_tokens_and_scores_of_all_real_captions_are_those_of_coco_caption(coco_caption, source, broken):
    corpus = assert_equal(coco_caption, *leave_one_out(read_captions(source), broken))
    assert corpus == pytest.approx(EXPECTED[source, broken], abs=1e-12)
