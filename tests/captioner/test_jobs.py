"""Runs over many pictures: nothing is lost, nothing counts for another picture, one bad name costs one line."""

import io
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from captioner.errors import ImageError, OutputError
from captioner.jobs import Destination, OverlaySettings, Run, Selection
from captioner.search import SearchSettings

posix = pytest.mark.skipif(os.name != "posix", reason="names, FIFOs and permissions of POSIX")


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(*names, colour="red"):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(name)


def feed(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def names_in(text):
    return [line.split("\t")[0] for line in text.splitlines()]


# A result counts for its own picture only


def test_an_overlay_belongs_to_its_own_picture(run, workdir):
    for name, colour in {"p/dog.png": "red", "q/dog.png": "blue"}.items():
        save(name, colour=colour)
    assert run("p/dog.png", "--overlay", "seen")[0] == 0
    code, out, err = run("q/dog.png", "--overlay", "seen")
    assert (code, out.count("\n"), err) == (0, 1, "")
    files = {path.name: path.read_bytes() for path in Path("seen").iterdir()}
    assert len(files) == len(set(files.values())) == 2
    for name in ("p/dog.png", "./q/dog.png", str(workdir / "q" / "dog.png")):
        assert run(name, "--overlay", "seen") == (0, "", "caption: 1 of 1 pictures have captions already\n")
    Path("seen/dog.png").unlink()
    assert "have captions already" in run("q/dog.png", "--overlay", "seen")[2]
    run("p/dog.png", "--overlay", "seen")
    assert {path.name: path.read_bytes() for path in Path("seen").iterdir()} == files


def test_an_overlay_is_recognised_from_another_folder(run, workdir, monkeypatch):
    for folder, colour in {"p": "red", "q": "blue"}.items():
        save(f"{folder}/dog.png", colour=colour)
        monkeypatch.chdir(folder)
        code, out, _ = run("dog.png", "--overlay", "../seen")
        assert (code, out.count("\n")) == (0, 1)
        monkeypatch.chdir(workdir)
    assert len(list(Path("seen").iterdir())) == 2
    assert run("p", "q", "--overlay", "seen")[2] == "caption: 2 of 2 pictures have captions already\n"


@pytest.mark.parametrize("format", ["png", "gif", "html"])
def test_an_overlay_replaces_only_that_of_its_own_picture(run, workdir, format):
    save("a/dog.jpg", "b/dog.jpg", "b/dog.png")
    command = ["a", "b", "--overlay", "seen", "--overlay-format", format]
    Path("seen").mkdir()
    Path(f"seen/dog.{format}").write_text("precious")
    for options in ([], ["--overwrite"], ["--existing", "append"]):
        assert run(*command, *options)[0] == 0
        assert len(list(Path("seen").iterdir())) == 4
        assert Path(f"seen/dog.{format}").read_text() == "precious"
    before = {path: path.stat().st_mtime_ns for path in Path("seen").iterdir()}
    assert run(*command)[2] == "caption: 3 of 3 pictures have captions already\n"
    run(*command, "--overwrite")
    assert sum(path.stat().st_mtime_ns != before[path] for path in Path("seen").iterdir()) == 3


def test_an_overlay_does_not_contain_the_path_of_its_picture(run, workdir):
    save("private/dog.jpg")
    for format in ("png", "gif", "html"):
        assert run("private", "--overlay", "seen", "--overlay-format", format)[0] == 0
        assert b"private" not in Path(f"seen/dog.{format}").read_bytes()


def test_overlays_never_replace_pictures(run, workdir):
    save("p/dog.png")
    before = Path("p/dog.png").read_bytes()
    code, out, err = run("p", "--overlay", "p")
    assert (code, out) == (1, "")
    assert (
        err
        == "caption: error: p: this folder is in the folder of --overlay. Choose another folder for the overlays.\n"
    )
    assert run("p/dog.png", "--overlay", "p", "--overwrite")[0] == 0
    assert Path("p/dog.png").read_bytes() == before
    assert len(list(Path("p").iterdir())) == 2


def test_standard_input_is_always_captioned(run, workdir, pictures, monkeypatch):
    for options in (["-f", "jsonl", "-o", "o.jsonl"], ["--overlay", "seen"], ["-o", "o.csv", "--overlay", "seen"]):
        outputs = []
        for picture in (pictures[0], pictures[1], pictures[0]):
            feed(monkeypatch, picture.read_bytes())
            code, out, err = run("-", *options)
            assert (code, err) == (0, "")
            outputs.append(out)
        assert len(set(outputs)) == (1 if "-o" in options else 2)
    assert [json.loads(line)["image"] for line in Path("o.jsonl").read_text().splitlines()] == ["-", "-", "-"]
    assert len(Path("o.csv").read_text().splitlines()) == 4
    assert len(list(Path("seen").iterdir())) == 2  # of two pictures


@posix
def test_a_fifo_is_read_once_and_always_captioned(run, workdir, pictures):
    os.mkfifo("pipe")
    for _ in range(2):
        writer = threading.Thread(target=Path("pipe").write_bytes, args=[pictures[0].read_bytes()])
        writer.start()
        assert run("pipe", pictures[1], "-o", "out.txt", "--overlay", "seen")[0] == 0
        writer.join()
    assert names_in(Path("out.txt").read_text()) == ["pipe", str(pictures[1]), "pipe"]
    assert run("pipe", "--sidecar", ".txt")[2].startswith("caption: error: pipe: --sidecar needs files")


def test_an_ambiguous_sidecar_is_refused_in_a_later_run(run, workdir):
    save("dog.png")
    assert run("dog.png", "--sidecar", ".txt")[0] == 0
    save("dog.jpg", colour="blue")
    code, out, err = run("dog.jpg", "--sidecar", ".txt")
    assert (code, out) == (1, "")
    assert err == (
        "caption: error: dog.jpg: dog.png in the same folder would have the same file dog.txt. "
        "Rename one of them, or write the captions with --output.\n"
    )


def test_one_picture_by_two_names_has_one_sidecar(run, workdir):
    save("p/a.png")
    assert run("p/a.png", "./p/a.png", "--sidecar", ".q")[0] == 0
    assert sorted(path.name for path in Path("p").iterdir()) == ["a.png", "a.q"]


def test_sidecars_are_read_by_the_data_layout_folder(run, workdir):
    from evaluation.datasets.files import Problems
    from evaluation.datasets.own import read_folder

    save("p/my.dog.jpg", "p/q/CAT.PNG")
    assert run("p", "--sidecar", ".txt")[0] == 0
    records = read_folder(Path("p"), Problems())
    assert [record.image_id for record in records] == ["my.dog.jpg", "q/CAT.PNG"]
    assert all(len(record.captions) == 1 for record in records)


# One bad name costs one line


@posix
def test_names_that_are_too_long_are_reported(run, workdir):
    save("a.png")
    long = "x" * 251 + ".png"
    save(long)
    missing = "y" * 300 + ".png"
    code, out, err = run("a.png", missing, long, "--sidecar", ".caption", "--overlay", "seen", "--failures", "f")
    assert code == 1
    assert names_in(out) == ["a.png", long]
    assert err.splitlines()[0] == f"caption: error: {missing}: cannot read this file (File name too long)."
    assert f"{long[:-4]}.caption: cannot write this file (File name too long)" in err.splitlines()[1]
    assert len(err.splitlines()) == 3
    assert Path("a.caption").exists()
    assert sorted(len(path.name) for path in Path("seen").iterdir()) == [5]
    assert run(long, "--overlay", "seen", "--overlay-format", "html")[0] == 0  # whose name would be too long
    assert Path("f").read_text().splitlines() == [missing, long]
    for options in (["-o", missing], ["-m", missing], ["--failures", missing], ["--overlay", missing]):
        code, out, err = run("a.png", *options)
        assert code == (1 if "--overlay" in options else 2)
        assert err.count("\n") == 1
        assert missing in err


@posix
def test_missing_permissions_are_reported(run, workdir, ordinary_user):
    save("p/a.png", "p/closed/b.png", "p/read-only/c.png", "p/z.png")
    Path("p/closed").chmod(0)
    Path("p/read-only").chmod(0o500)
    Path("fixed").mkdir(mode=0o500)
    code, out, err = run("p", "p/closed/b.png", "--sidecar", ".txt", "--failures", "f")
    assert (code, names_in(out)) == (1, ["p/a.png", "p/read-only/c.png", "p/z.png"])
    assert err.splitlines() == [
        "caption: error: p/closed: cannot read this folder (Permission denied)",
        "caption: error: p/read-only/c.txt: cannot write this file (Permission denied). "
        "Check that its folder exists and is writable.",
        "caption: error: p/closed/b.png: no permission to read this file.",
        "caption: 2 of 4 pictures failed",
    ]
    assert Path("f").read_text().splitlines() == ["p/closed", "p/read-only/c.png", "p/closed/b.png"]
    code, out, err = run("p/a.png", "p/z.png", "--overlay", "fixed")
    assert (code, out.count("\n")) == (1, 2)
    assert err.count("fixed/a.png: cannot write this file") == err.count("fixed/z.png: cannot write this file") == 1
    for options in (["-o", "fixed/out"], ["--failures", "fixed/f"]):
        code, _, err = run("p/a.png", *options)
        assert (code, err.count("\n")) == (2, 1)
    Path("p/closed").chmod(0o700)


def test_a_picture_deleted_before_it_is_drawn_is_reported(workdir, tiny, pictures):
    reported = []
    destination = Destination("out.txt", overlay=OverlaySettings(Path("seen")))
    with Run(Selection(tuple(map(str, pictures[:3]))), destination, 1, reported.append) as counted:

        def show(results):
            for number, result in enumerate(results):
                if number == 1:
                    pictures[1].unlink()
                yield result

        counted.execute(lambda: tiny, SearchSettings(), 64, show)
    assert counted.counts.failed == 1
    assert reported == [f"error: {pictures[1]}: no such file. Check the path."]
    assert len(list(Path("seen").iterdir())) == 2


# Names


@posix
def test_messages_stay_on_one_line_and_do_not_reach_the_terminal(run, workdir):
    name = "bad\nnew\x1b[32m\x9b\u2028.png"
    Path(name).write_text("no picture")
    _, _, err = run(name, "--failures", "no\x1b/f")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    code, out, err = run(name, "x\x1by.png")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        r"caption: error: bad\nnew\x1b[32m\x9b\u2028.png: cannot read this image (unknown format). "
        "Convert it to JPEG or PNG.",
        r"caption: error: x\x1by.png: no such file. Check the path.",
        "caption: 2 of 2 pictures failed",
    ]
    assert "\x1b" not in run("a.png", "--shard", "\x1b[32m")[2]
    assert "\x1b" not in run("a.png", "--\x1b[32m")[2]


ODD = [
    "new\nline.png",
    "carriage\r",
    " ",
    "[ab].png",
    "*",
    "\ufeffmark.png",
    os.fsdecode(b"\xff\xfe.png"),
    "tab\t.png",
]


@posix
def test_a_list_of_failures_round_trips(run, workdir):
    for name in ODD:
        Path(name).write_text("no picture")
    assert run(*ODD, "--failures", "f", "--null")[0] == 1
    listed = Path("f").read_bytes()
    assert listed == b"".join(os.fsencode(name) + b"\0" for name in ODD)
    for name in ODD:  # vanished names are not patterns
        Path(name).unlink()
    save("a.png")
    assert run("--from-file", "f", "--null", "--failures", "g", "--null")[1] == ""
    assert Path("g").read_bytes() == listed


@posix
def test_names_with_line_breaks_are_counted_and_not_listed(run, workdir):
    for name in ODD:
        Path(name).write_text("no picture")
    _, _, err = run(*ODD, "--failures", "f")
    assert "caption: not listed in f, because their names contain line breaks: 5. Add --null to list all.\n" in err
    assert Path("f").read_text().splitlines() == ["[ab].png", "*", "tab\t.png"]
    assert run("--from-file", "f", "--failures", "g")[0] == 1
    assert Path("g").read_bytes() == Path("f").read_bytes()


def test_an_empty_list_is_reported(run, workdir, monkeypatch):
    Path("list").write_text("\n")
    assert run("--from-file", "list") == (0, "", "caption: list: this list is empty\n")
    assert run("--from-file", "list", "-o", "out.csv")[0] == 0
    assert Path("out.csv").read_text() == "image,rank,caption,log_prob,log_probs,confidence,word_confidences\n"


def test_an_invalid_list_ends_the_run_after_its_valid_part(run, workdir):
    save("a.png")
    Path("list").write_bytes(b"a.png\n" * 20_000 + b"x" * 200_000)
    code, _, err = run("--from-file", "list", "--shard", "1/20000")
    assert code == 2
    assert err.startswith("caption: error: list: expected a list of names, got one of more than 65,536 characters")


# Outputs


def test_a_list_of_pictures_is_not_overwritten_with_captions(run, workdir):
    save("a.png")
    Path("list").write_text("a.png\n")
    code, _, err = run("--from-file", "list", "-o", "./list", "--overwrite")
    assert code == 2
    assert "list: this is the list of pictures" in err
    assert Path("list").read_text() == "a.png\n"


@pytest.mark.parametrize("option", ["-o", "--failures"])
def test_a_picture_is_never_overwritten_whatever_its_name(run, workdir, option):
    save("a.png")
    Path("a.png").rename("a")
    before = Path("a").read_bytes()
    code, _, err = run("none.png", option, "a", "--existing", "overwrite", "--sidecar", ".txt")
    assert (code, err) == (
        2,
        "caption: error: a: this is the name of a picture. Choose another, such as captions.txt.\n",
    )
    assert Path("a").read_bytes() == before


def test_an_output_is_not_changed_if_all_pictures_fail(run, workdir):
    Path("out.txt").write_text("precious\n")
    assert run("none.png", "-o", "out.txt", "--overwrite", "--failures", "f")[0] == 1
    assert Path("out.txt").read_text() == "precious\n"


@pytest.mark.parametrize("name", ["out.txt", "out.csv", "out.jsonl"])
def test_a_shard_without_pictures_leaves_an_empty_output_and_loads_no_model(run, workdir, name, monkeypatch):
    save("a.png")
    monkeypatch.setattr("captioner.captioning.load", lambda *_, **__: pytest.fail("loaded"))
    assert run("a.png", "--shard", "2/2", "-o", name) == (0, "", "")
    assert len(Path(name).read_text().splitlines()) == (name == "out.csv")


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [
        ("x.csv", [], "image,rank"),
        ("x.CSV", [], "image,rank"),
        ("x.jsonl", [], '{"image"'),
        ("x.ndjson", [], '{"image"'),
        ("x.tsv", [], "a.png\t"),
        ("x.csv", ["-f", "text"], "a.png\t"),
        ("x.txt", ["-f", "csv"], "image,rank"),
    ],
)
def test_the_default_format_depends_on_the_suffix(run, workdir, name, options, start):
    save("a.png", "b.png")
    assert run("a.png", "b.png", "-o", name, *options)[0] == 0
    assert Path(name).read_text().startswith(start)


def test_json_is_not_guessed(run, workdir):
    code, _, err = run("a.png", "-o", "x.json")
    assert code == 2
    assert "x.json: add --format jsonl for JSON Lines" in err


def test_a_minus_is_standard_output(run, workdir):
    save("a.png", "b.png")
    assert run("a.png", "-o", "-") == run("a.png")
    assert not Path("-").exists()


def test_alternatives_are_written_only_on_request(run, workdir):
    save("a.png")
    page = ["--overlay", "seen", "--overlay-format", "html"]
    assert "alternatives" not in json.loads(run("a.png", "-f", "jsonl", *page)[1])
    row = json.loads(run("a.png", "-f", "jsonl", *page, "--alternatives", 2, "--overwrite")[1])
    assert {len(others) for others in row["alternatives"]} == {2}
    assert Path("seen/a.html").read_text().count("<br>instead: ") == len(row["words"])


# Streams of pictures


class Stub:
    """A model that can read no picture."""

    def caption_batches(self, sources, settings, batch_size):
        sources = iter(sources)
        while batch := list(itertools.islice(sources, batch_size)):
            yield from ((source, ImageError(f"{source}: no")) for source in batch)


def test_names_are_prefetched_for_at_most_two_batches(workdir):
    asked = 0

    def names():
        nonlocal asked
        for asked in itertools.count(1):  # without end
            yield f"{asked}.png"

    run = Run(Selection(list_file=os.devnull), Destination("out.txt"), 1, lambda line: None)
    with run:
        run._listed = names()

        def show(results):
            for number, result in enumerate(itertools.islice(results, 50), start=1):
                yield result
                assert asked <= number + 2 * 4

        run.execute(Stub, SearchSettings(), 4, show)
    assert run.counts.failed == 50


@pytest.mark.slow
def test_memory_does_not_grow_with_the_list(workdir):
    resource = pytest.importorskip("resource")
    lines = 300_000
    with Path("list").open("w") as file:
        file.writelines(f"photos/{'folder/' * 8}{number}.jpg\n" for number in range(lines))
    with Path("out.txt").open("w") as file:
        file.writelines(f"photos/{'folder/' * 8}{number}.jpg\ta dog\n" for number in range(lines - 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = Run(Selection(list_file="list"), Destination("out.txt", failures="f"), 1, lambda line: None)
    with run:
        run.execute(Stub, SearchSettings(), 4)
    assert (run.counts.pictures, run.counts.done, run.counts.failed) == (lines, lines - 10, 10)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
    )  # kilobytes; the names alone have 21 MB


def test_the_first_caption_of_a_long_list_is_immediate(workdir):
    with Path("list").open("w") as file:
        file.writelines(f"{number}.jpg\n" for number in range(500_000))
    started = time.process_time()
    run = Run(Selection(list_file="list"), Destination("out.txt"), 1, lambda line: None)

    def show(results):
        yield next(iter(results))
        assert time.process_time() - started < 1

    with run:
        run.execute(Stub, SearchSettings(), 4, show)


def test_an_interrupted_run_keeps_the_old_list_of_failures(workdir):
    Path("f").write_text("a.png\nb.png\n")
    run = Run(Selection(list_file="f"), Destination(failures="f"), 1, lambda line: None)

    def show(results):
        yield next(iter(results))
        raise KeyboardInterrupt

    with run, pytest.raises(KeyboardInterrupt):
        run.execute(Stub, SearchSettings(), 1, show)
    assert Path("f").read_text() == "a.png\nb.png\n"


def test_an_output_is_unlocked_if_a_run_cannot_start(workdir):
    run = Run(Selection(("a", "b")), Destination("out.txt"), 1, print)
    Path("out.txt").write_text("notes\n")
    with pytest.raises(OutputError, match="captions of --format text"):
        run.__enter__()
    Path("out.txt").write_text("")
    with run:
        pass
