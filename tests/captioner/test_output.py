import csv
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from captioner.captioning import Caption
from captioner.errors import OutputError
from captioner.images import Rectangle
from captioner.output import FORMATS, make_writer, plan_output, sidecar_path, spell, write_sidecar


def make_caption(text="a dog", log_prob=-1.23456789, candidates=()):
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
    )


def written(format, *pictures, **options):
    stream = io.StringIO()
    writer = make_writer(format, stream, **options)
    for image, caption in pictures:
        writer.write(image, caption)
    return stream.getvalue()


def test_text_is_the_name_a_tab_and_the_caption():
    assert written("text", ("b.jpg", make_caption()), ("a.jpg", make_caption("a cat"))) == (
        "b.jpg\ta dog\na.jpg\ta cat\n"
    )


def test_text_without_names_is_the_caption_alone():
    assert written("text", ("b.jpg", make_caption()), names=False) == "a dog\n"


def test_text_gives_a_line_a_candidate_best_first():
    caption = make_caption("a", candidates=(make_caption("b"), make_caption("c")))
    assert written("text", ("x.jpg", caption)) == "x.jpg\ta\nx.jpg\tb\nx.jpg\tc\n"


@pytest.mark.parametrize("format", ["text", "csv"])
@pytest.mark.parametrize("character", "\t\n\r\v\f\x00\x1b\x7f\x85\u2028\u2029")
def test_a_control_character_in_a_name_leaves_lines_lines(format, character):
    lines = written(format, (f"a{character}b.jpg", make_caption())).splitlines()
    assert lines[-1].startswith("a\\")
    assert len(lines) == (2 if format == "csv" else 1)


def test_names_of_windows_and_of_other_scripts_stay_as_they_are():
    assert written("text", ("C:\\fotos\\søster 犬.jpg", make_caption())).startswith("C:\\fotos\\søster 犬.jpg\t")


def test_json_lines_hold_one_object_a_picture():
    lines = written("jsonl", ("ö.jpg", make_caption()), ("b.jpg", make_caption("a cat"))).splitlines()
    assert "ö.jpg" in lines[0]
    assert json.loads(lines[0]) == {
        "image": "ö.jpg",
        "caption": "a dog",
        "log_prob": -1.23457,
        "words": ["a", "dog"],
        "log_probs": [-0.12346, -0.12346],
    }
    assert json.loads(lines[1])["caption"] == "a cat"


def test_json_lines_hold_the_alternatives_when_there_are_any():
    alternatives = ({"the": -0.123456789, "one": -np.inf}, {})
    candidate = replace(make_caption("a cat"), alternatives=alternatives)
    line = json.loads(written("jsonl", ("a.jpg", replace(candidate, candidates=(candidate,)))))
    assert line["alternatives"] == line["candidates"][0]["alternatives"] == [{"the": -0.12346, "one": None}, {}]


def test_json_lines_hold_the_candidates_when_there_are_any():
    line = written("jsonl", ("a.jpg", make_caption(candidates=(make_caption("a cat", -2.0),))))
    (candidate,) = json.loads(line)["candidates"]
    assert (candidate["caption"], candidate["log_prob"], candidate["words"]) == ("a cat", -2.0, ["a", "cat"])
    assert "image" not in candidate


def test_json_lines_hold_attention_and_its_place_when_asked():
    caption = make_caption(candidates=(make_caption("a cat"),))
    record = json.loads(written("jsonl", ("a.jpg", caption), attention=True))
    assert record["attention"] == [[[0.16667] * 3] * 2] * 2
    assert record["rectangle"] == [0.125, 0, 0.875, 1]
    assert record["candidates"][0]["attention"] == record["attention"]


def test_json_is_strict_when_a_probability_is_zero():
    line = written("jsonl", ("a.jpg", make_caption(log_prob=float("-inf"))))
    assert json.loads(line, parse_constant=pytest.fail)["log_prob"] is None


def test_csv_has_a_header_and_a_row_a_candidate():
    caption = make_caption('a "dog", maybe', candidates=(make_caption("a cat", -2.0),))
    rows = list(csv.DictReader(io.StringIO(written("csv", ("a,b.jpg", caption)))))
    assert rows == [
        {
            "image": "a,b.jpg",
            "rank": "1",
            "caption": 'a "dog", maybe',
            "log_prob": "-1.23457",
            "log_probs": "-0.12346 -0.12346 -0.12346",
        },
        {"image": "a,b.jpg", "rank": "2", "caption": "a cat", "log_prob": "-2.0", "log_probs": "-0.12346 -0.12346"},
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_a_name_that_is_not_utf8_is_escaped(format, tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    with plan_output(tmp_path / "out").open() as stream:
        make_writer(format, stream).write(name, make_caption())
    assert "caf\\udce9.jpg" in (tmp_path / "out").read_text("utf-8")


def test_json_gives_a_name_that_is_not_utf8_back():
    name = os.fsdecode(b"caf\xe9\n\t\\.jpg")
    assert json.loads(written("jsonl", (name, make_caption())))["image"] == name


@pytest.mark.parametrize("format", FORMATS)
def test_each_picture_is_in_the_file_as_soon_as_it_is_written(format, tmp_path):
    path = tmp_path / "out"
    with plan_output(path).open() as stream:
        writer = make_writer(format, stream)
        for count in (1, 2):
            writer.write("a.jpg", make_caption())
            lines = path.read_bytes().splitlines(keepends=True)
            assert len(lines) == count + (format == "csv")
            assert lines[-1].endswith(b"\n")


def test_an_unknown_format_is_refused():
    with pytest.raises(OutputError, match=r"'xml'\. Choose one of text, jsonl, csv"):
        make_writer("xml", io.StringIO())


def test_an_existing_output_is_overwritten_only_on_demand(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"out\.csv: exists already"):
        plan_output(path)
    assert path.read_text() == "old"
    with plan_output(path, existing="overwrite").open():
        pass
    assert path.read_text() == ""


@pytest.mark.parametrize("place", ["missing/out.csv", "."])
def test_an_output_that_cannot_be_opened_is_an_output_error(tmp_path, place):
    with pytest.raises(OutputError, match="cannot write this file"):
        plan_output(tmp_path / place, existing="overwrite").open()


def test_a_sidecar_stands_beside_its_picture(tmp_path):
    path = sidecar_path(tmp_path / "my.dog.jpg", ".txt")
    assert path == tmp_path / "my.dog.txt"
    write_sidecar(path, make_caption("ein Hündchen"))
    assert path.read_bytes() == "ein Hündchen\n".encode()


def test_an_existing_sidecar_is_overwritten_or_added_to_only_on_demand(tmp_path):
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
    ("name", "suffix"), [("dog.jpg", ".jpg"), ("dog.jpg", ".JPG"), ("dog.jpg", ".small.png"), ("dog.dat", ".dat")]
)
def test_a_sidecar_never_takes_the_place_of_a_picture(name, suffix):
    with pytest.raises(OutputError, match="suffix of pictures"):
        sidecar_path(name, suffix)


@pytest.mark.parametrize("suffix", ["", ".", "txt", "./txt", ".a/../../b", ".txt."])
def test_what_is_no_suffix_is_refused(suffix):
    with pytest.raises(OutputError, match="is no suffix"):
        sidecar_path("dog.jpg", suffix)


NAMES = ["a b.jpg", "tab\there.jpg", 'quote",.jpg', os.fsdecode(b"caf\xe9.jpg")]


def write_all(output, format, names):
    with output.open() as stream:
        writer = make_writer(format, stream, heading=not output.kept)
        for name in names:
            writer.write(name, replace(make_caption(), candidates=(make_caption("a cat"),)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_gone_on_with_after_the_last_picture_that_it_has_whole(format, tmp_path):
    """Wherever a run was cut off, the next one makes the file what an undisturbed one would have."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_all(plan_output(whole), format, NAMES)
    content = whole.read_bytes()
    for length in range(len(content) + 1):
        cut.write_bytes(content[:length])
        output = plan_output(cut, format, "skip", candidates=2)
        todo = [name for name in NAMES if spell(name, format) not in output.done]
        assert todo == NAMES[len(NAMES) - len(todo) :]
        assert todo or length == len(content)
        write_all(output, format, todo)
        assert cut.read_bytes() == content


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_added_comes_after_what_is_there(format, tmp_path):
    path = tmp_path / "out"
    write_all(plan_output(path), format, NAMES)
    before = path.read_bytes()
    output = plan_output(path, format, "append", candidates=2)
    assert not output.done
    write_all(output, format, NAMES[:1])
    assert path.read_bytes().startswith(before)
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("format", "content"),
    [
        ("text", b"notes\n"),
        ("text", b"\xff\t\n"),
        ("jsonl", b"[1]\n"),
        ("jsonl", b"dog\n"),
        ("csv", b"a,b\n"),
        ("csv", b"a" * 200_000 + b"\n"),
    ],
)
def test_a_file_of_something_else_is_never_added_to(format, content, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=rf"out: line 1 is no caption of --format {format}"):
        plan_output(path, format, "skip")
    assert path.read_bytes() == content


def test_csv_of_other_columns_is_never_added_to(tmp_path):
    path = tmp_path / "out"
    path.write_text("image,rank,caption,log_prob\na.jpg,1,a dog,-1.5\n")
    message = r"line 1 is no caption of --format csv \(4 columns, not image, rank, caption, log_prob, log_probs\)"
    with pytest.raises(OutputError, match=message):
        plan_output(path, "csv", "skip")
