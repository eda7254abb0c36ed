import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import captioner
from captioner.caption import Caption, Rectangle
from captioner.errors import DataError, OutputError
from captioner.output import FORMATS, Sidecars, write_sidecar


def make_caption(text="a dog", log_prob=-1.23456789, candidates=(), **others):
    words = tuple(text.split())
    return Caption(
        words=words,
        text=text,
        log_probs=(-0.123456789,) * len(words),
        log_prob=log_prob,
        score=log_prob,
        attention=np.full((len(words), 2, 3), 1 / 6, np.float32),
        rectangle=Rectangle(0.125, 0, 0.875, 1),
        candidates=candidates,
        **others,
    )


def written(format, *pictures, **options):
    """Return a whole file."""
    lines = FORMATS[format](**options)
    return lines.heading + "".join(lines.lines(image, caption) for image, caption in pictures)


def test_text_is_the_name_a_tab_and_the_caption():
    assert written("text", ("b.jpg", make_caption()), ("a.jpg", make_caption("a cat"))) == (
        "b.jpg\ta dog\na.jpg\ta cat\n"
    )


def test_text_without_names_is_the_caption_alone():
    assert written("text", ("b.jpg", make_caption()), names=False) == "a dog\n"


def test_text_has_one_line_per_candidate_best_first():
    caption = make_caption("a", candidates=(make_caption("b"), make_caption("c")))
    assert written("text", ("x.jpg", caption)) == "x.jpg\ta\nx.jpg\tb\nx.jpg\tc\n"


@pytest.mark.parametrize("format", ["text", "csv"])
@pytest.mark.parametrize("character", "\t\n\r\v\f\x00\x1b\x7f\x85\u2028\u2029")
def test_control_characters_in_names_do_not_break_lines(format, character):
    lines = written(format, (f"a{character}b.jpg", make_caption())).splitlines()
    assert lines[-1].startswith("a\\")
    assert len(lines) == (2 if format == "csv" else 1)


def test_names_of_windows_and_unicode_are_not_changed():
    assert written("text", ("C:\\fotos\\søster 犬.jpg", make_caption())).startswith("C:\\fotos\\søster 犬.jpg\t")


def test_json_lines_have_one_object_per_picture():
    lines = written("jsonl", ("ö.jpg", make_caption()), ("b.jpg", make_caption("a cat"))).splitlines()
    assert "ö.jpg" in lines[0]
    assert json.loads(lines[0]) == {
        "image": "ö.jpg",
        "caption": "a dog",
        "log_prob": -1.23457,
        "score": -1.23457,
        "words": ["a", "dog"],
        "log_probs": [-0.12346, -0.12346],
    }
    assert json.loads(lines[1])["caption"] == "a cat"


def test_json_lines_contain_the_alternatives():
    alternatives = ({"the": -0.123456789, "one": -np.inf}, {})
    candidate = replace(make_caption("a cat"), alternatives=alternatives)
    line = json.loads(written("jsonl", ("a.jpg", replace(candidate, candidates=(candidate,)))))
    assert line["alternatives"] == line["candidates"][0]["alternatives"] == [{"the": -0.12346, "one": None}, {}]


def test_json_lines_contain_the_candidates():
    line = written("jsonl", ("a.jpg", make_caption(candidates=(make_caption("a cat", -2.0),))))
    (candidate,) = json.loads(line)["candidates"]
    assert (candidate["caption"], candidate["log_prob"], candidate["words"]) == ("a cat", -2.0, ["a", "cat"])
    assert "image" not in candidate


def test_json_lines_contain_attention_on_request():
    caption = make_caption(candidates=(make_caption("a cat"),))
    record = json.loads(written("jsonl", ("a.jpg", caption), attention=True))
    assert record["attention"] == [[[0.16667] * 3] * 2] * 2
    assert record["rectangle"] == [0.125, 0, 0.875, 1]
    assert record["candidates"][0]["attention"] == record["attention"]


def test_json_is_strict_when_a_probability_is_zero():
    line = written("jsonl", ("a.jpg", make_caption(log_prob=float("-inf"))))
    assert json.loads(line, parse_constant=pytest.fail)["log_prob"] is None


def test_csv_has_a_header_and_a_row_per_candidate():
    rated = {"confidence": 0.25, "word_confidences": (None, 0.123456, 0.5)}
    caption = make_caption('a "dog", maybe', candidates=(make_caption("a cat", -2.0),), **rated)
    rows = list(csv.DictReader(io.StringIO(written("csv", ("a,b.jpg", caption)))))
    assert rows == [
        {
            "image": "a,b.jpg",
            "rank": "1",
            "caption": 'a "dog", maybe',
            "log_prob": "-1.23457",
            "log_probs": "-0.12346 -0.12346 -0.12346",
            "confidence": "0.25",
            "word_confidences": "- 0.12346 0.5",
        },
        {
            "image": "a,b.jpg",
            "rank": "2",
            "caption": "a cat",
            "log_prob": "-2.0",
            "log_probs": "-0.12346 -0.12346",
            "confidence": "",
            "word_confidences": "",
        },
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_a_name_that_is_not_utf8_is_escaped(format):
    assert "caf\\udce9.jpg" in written(format, (os.fsdecode(b"caf\xe9.jpg"), make_caption()))


NAMES = ["a b.jpg", "tab\there.jpg", 'quote",.jpg', "", "-", "犬.jpg", os.fsdecode(b"caf\xe9.jpg")]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_each_line_starts_with_its_picture_and_its_name_can_be_read_back(format, name):
    writer = FORMATS[format]()
    lines = writer.lines(name, make_caption(candidates=(make_caption('a "cat", red'),))).splitlines()
    assert len(lines) == (1 if writer.whole_line else 2)
    for line in lines:
        assert line.startswith(writer.start(name))
        assert writer.read_name(line) == writer.spell(name)


@pytest.mark.parametrize("attention", [True, False])
def test_captions_are_read_back_from_json_lines(tmp_path, run, pictures, attention):
    file = tmp_path / "captions.jsonl"
    code, _, _ = run(*pictures, "-o", file, "--candidates", 2, *["--attention"] * attention)
    assert code == 0
    captions = dict(captioner.read_captions(file))
    assert list(captions) == list(map(str, pictures))
    for line, (image, caption) in zip(file.read_text().splitlines(), captions.items(), strict=True):
        assert json.loads(line) == {"image": image, **caption.to_dict(attention=attention)}
        assert caption.picture == image
        assert len(caption.candidates) == 1


def test_a_name_that_is_not_utf8_is_read_back_from_json_lines(tmp_path):
    file = tmp_path / "captions.jsonl"
    name = os.fsdecode(b"caf\xe9\n\t\\.jpg")
    file.write_text(written("jsonl", (name, make_caption())))
    assert [image for image, _ in captioner.read_captions(file)] == [name]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.jpg\ta dog", r"Expecting value: line 1 column 1 \(char 0\)"),
        ("[]", "list indices"),
        ("{}", "'image' is missing"),
        ('{"image": ["x"]}', "image: expected a name"),
        ('{"image": "a.jpg"}', "caption record: 'words' is missing"),
        ("[" * 100_000, ""),
    ],
)
def test_a_line_that_is_not_a_record_is_named(tmp_path, line, reason):
    file = tmp_path / "captions.jsonl"
    file.write_text(written("jsonl", ("a.jpg", make_caption())) + line + "\n")
    captions = captioner.read_captions(file)
    assert next(captions)[0] == "a.jpg"
    with pytest.raises(
        DataError, match=rf"captions.jsonl: line 2: {reason}.*\. Expected a line of caption --format"
    ):
        next(captions)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "\xe9"}\n')
    for name, reason in {"latin.jsonl": "'utf-8' codec", "absent.jsonl": "No such file"}.items():
        with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
            next(captioner.read_captions(tmp_path / name))


def test_formats_are_registered_by_their_names():
    assert {name: format.name for name, format in FORMATS.items()} == {name: name for name in FORMATS}


def test_a_sidecar_is_beside_its_picture(tmp_path):
    path = Sidecars(".txt").path(tmp_path / "my.dog.jpg")
    assert path == tmp_path / "my.dog.txt"
    write_sidecar(path, make_caption("ein Hündchen"))
    assert path.read_bytes() == "ein Hündchen\n".encode()


@pytest.mark.parametrize(
    ("name", "sidecar"),
    [("dog.PNG", "dog.txt"), ("dog", "dog.txt"), ("dog.v2", "dog.v2.txt"), (".jpg", ".jpg.txt")],
)
def test_only_the_suffix_of_a_picture_is_replaced(name, sidecar):
    assert Sidecars(".txt").path(f"photos/{name}") == Path("photos", sidecar)


def test_pictures_that_would_share_a_sidecar_have_none(tmp_path):
    for name in ("dog.jpg", "dog.png", "cat.jpg", "cat.txt", "bird.webp"):
        (tmp_path / name).touch()
    sidecars = Sidecars(".txt")
    for name, other in {"dog.jpg": "dog.png", "dog.png": "dog.jpg", "bird": "bird.webp"}.items():
        with pytest.raises(OutputError, match=rf"{name}: {other} in the same folder would have the same file"):
            sidecars.path(tmp_path / name)
    assert sidecars.path(tmp_path / "cat.jpg") == tmp_path / "cat.txt"


def test_an_existing_sidecar_is_changed_only_on_demand(tmp_path):
    path = tmp_path / "dog.txt"
    path.write_text("by hand")
    with pytest.raises(OutputError, match=r"dog\.txt: exists already"):
        write_sidecar(path, make_caption())
    assert path.read_text() == "by hand"
    for existing, content in {"append": "by hand\na dog\n", "overwrite": "a dog\n"}.items():
        write_sidecar(path, make_caption(), existing)
        assert path.read_text() == content
    write_sidecar(path, make_caption(), "append")
    assert path.read_text() == "a dog\na dog\n"


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        ((".jpg", ".JPG", ".small.png"), "suffix of pictures"),
        (("", ".", "txt", "./txt", ".a/../../b", ".txt."), "is not a suffix"),
    ],
)
def test_an_invalid_suffix_is_refused(suffixes, message):
    for suffix in suffixes:
        with pytest.raises(OutputError, match=message):
            Sidecars(suffix)
