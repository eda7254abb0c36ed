import io
import itertools
import json
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
from PIL import Image

import captioner
from captioner.model_file import SHIPPED


def test_one_picture_prints_only_its_caption(run, pictures):
    code, out, err = run(pictures[0])
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "\t" not in out


def test_several_pictures_are_printed_with_names_in_order(run, pictures):
    chosen = [pictures[3], pictures[0], pictures[2]]
    code, out, _ = run(*chosen, "--batch-size", 2)
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(path) for path in chosen]


def test_a_folder_is_captioned_recursively_in_order(run, pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    deeper = tmp_path / "trip" / "day 1"
    deeper.mkdir(parents=True)
    Image.new("RGB", (30, 30)).save(deeper / "sea.jpg")
    code, out, _ = run(tmp_path)
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [*map(str, pictures), str(deeper / "sea.jpg")]


def test_standard_input_is_a_picture(run, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pictures[0].read_bytes())))
    code, out, _ = run("-", "--overlay", tmp_path / "overlays")
    assert code == 0
    assert out == run(pictures[0])[1]
    assert (tmp_path / "overlays" / "standard-input.png").exists()


def test_json_lines_contain_all_fields(run, pictures):
    code, out, _ = run(*pictures[:2], "-f", "jsonl", "--candidates", 3, "--attention")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["image"] for row in rows] == [str(path) for path in pictures[:2]]
    assert len(rows[0]["candidates"]) == 2
    assert len(rows[0]["attention"]) == len(rows[0]["words"])


def test_an_existing_file_is_kept_unless_overwriting_is_allowed(run, pictures, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("precious")
    code, _, err = run(pictures[0], "-o", file)
    assert code == 2
    assert "captions.txt: exists already" in err
    assert file.read_text() == "precious"
    assert run(pictures[0], "-o", file, "--overwrite")[0] == 0
    assert file.read_text() != "precious"


def test_sidecars_are_written_beside_their_pictures(run, pictures):
    assert run(*pictures[:2], "--sidecar", ".txt")[0] == 0
    assert pictures[0].with_suffix(".txt").read_text() == run(pictures[0])[1]
    pictures[0].with_suffix(".txt").write_text("by hand")
    code, out, err = run(*pictures[:3], "--sidecar", ".txt")
    assert (code, err) == (0, "caption: 2 of 3 pictures have captions already\n")
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(pictures[2])]
    assert pictures[0].with_suffix(".txt").read_text() == "by hand"
    assert pictures[2].with_suffix(".txt").exists()
    assert run(*pictures[:3], "--sidecar", ".txt", "--existing", "append")[0] == 0
    assert pictures[0].with_suffix(".txt").read_text() == "by hand\n" + run(pictures[0])[1]
    assert run(*pictures[:3], "--sidecar", ".txt", "--overwrite")[0] == 0
    assert pictures[0].with_suffix(".txt").read_text() == run(pictures[0])[1]


def test_an_overlay_is_drawn_for_each_picture_and_names_never_collide(run, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (60, 40), "red").save(tmp_path / folder / "dog.jpg")
    assert run(tmp_path / "a", tmp_path / "b", "--overlay", tmp_path / "seen")[0] == 0
    plain, hashed = sorted((path.name for path in (tmp_path / "seen").iterdir()), key=len)
    assert plain == "dog.png"
    assert re.fullmatch(r"dog-[0-9a-f]{8}\.png", hashed)
    with Image.open(tmp_path / "seen" / "dog.png") as figure:
        assert figure.width > 300


def test_each_failure_is_one_line_and_the_run_continues(run, pictures, tmp_path):
    bad = tmp_path / "bad"
    (bad / "no-pictures").mkdir(parents=True)
    (bad / "text.jpg").write_text("hello")
    (bad / "zero.png").touch()
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(whole, "JPEG")
    (bad / "truncated.jpg").write_bytes(whole.getvalue()[:-2000])
    huge = Image.new("1", (20_000, 20_000))
    huge.save(bad / "huge.png")
    names = ["missing.jpg", "no-pictures", "text.jpg", "zero.png", "truncated.jpg", "huge.png"]
    code, out, err = run(pictures[0], *(bad / name for name in names), pictures[1])
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(pictures[0]), str(pictures[1])]
    *lines, summary = err.splitlines()
    assert len(lines) == len(names)
    assert summary == "caption: 5 of 7 pictures failed"  # a folder without pictures is none
    for name in names:
        assert sum(name in line for line in lines) == 1, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a picture"),
        (["x.jpg", "--batch-size", 0], "--batch-size: must be 1 to 4096, got 0"),
        (["x.jpg", "--attention"], "--attention needs --format jsonl"),
        (["-", "--sidecar", ".txt"], "--sidecar needs files"),
        (["x.jpg", "-o", "x.jpg", "--overwrite"], "x.jpg: this is the name of a picture"),
        (["x.jpg", "--failures", "x.heic"], "x.heic: this is the name of a picture"),
        (["x.jpg", "--candidates", 9], "--candidates: a beam of 5 cannot give 9"),
        (["x.jpg", "--sample", "--temperature", 0], "--temperature: must be "),
        (["x.jpg", "-m", "none.safetensors"], "none.safetensors: no such checkpoint"),
        (["x.jpg", "--device", "toaster"], "device 'toaster' cannot be used"),
    ],
)
def test_invalid_usage_exits_with_2_and_a_message(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_describe_model_prints_the_header(run):
    code, out, _ = run("--describe-model")
    assert code == 0
    assert json.loads(out)["card"] == {"about": "a test"}


def test_banned_words_are_not_written(run, pictures):
    def words(*options):
        rows = run(*pictures, "-f", "jsonl", *options)[1].splitlines()
        return {word for row in rows for word in json.loads(row)["words"]}

    first, second, *_ = sorted(words())
    assert words("--ban", first, "--ban", second).isdisjoint([first, second])


def test_required_words_are_written(run, pictures):
    for row in run(*pictures, "-f", "jsonl", "--require", "ball", "--require", "cat")[1].splitlines():
        assert {"ball", "cat"} <= set(json.loads(row)["words"])
    code, out, err = run(*pictures, "--require", "dogg")
    assert (code, out) == (2, "")
    assert "does not know the word 'dogg'. Closest known words: dog." in err


def test_diverse_candidates_differ(run, pictures):
    plain, diverse = (
        run(*pictures, "-f", "jsonl", "--beam-size", 6, "--candidates", 3, *options)[1]
        for options in ((), ("--diverse-groups", 3, "--diversity", 2))
    )
    assert plain != diverse
    code, out, err = run(*pictures, "--diverse-groups", 2)
    assert (code, out) == (2, "")
    assert "--diverse-groups: must divide beam_size, 5, got 2" in err


def test_a_closed_pipe_ends_the_run_silently(tiny_checkpoint, pictures):
    command = [sys.executable, "-m", "captioner", "-m", tiny_checkpoint, "--batch-size", "1", *pictures * 30]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_help_and_version_load_no_engine():
    code = (
        "import sys\nfrom captioner.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules"
    )
    for argument in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", code, argument], check=True, stdout=subprocess.DEVNULL)


def test_the_example_picture_is_in_the_package(run):
    code, out, _ = run("--example", "-f", "jsonl")
    assert code == 0
    image = Path(json.loads(out)["image"])
    assert image.parent == Path(captioner.__file__).parent
    assert image.stat().st_size < 50_000


@pytest.mark.parametrize("model", [pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED])
def test_shipped_models_caption_the_example_with_a_wave(run, model):
    code, out, _ = run("--example", "-m", model)
    assert code == 0
    assert " wave " in f" {out.strip()} "


def test_an_overlay_can_be_an_animation_or_a_page(run, pictures, tmp_path):
    assert run(pictures[0], "--overlay", tmp_path / "seen", "--overlay-format", "gif")[0] == 0
    code, out, _ = run(pictures[0], "-f", "jsonl", "--overlay", tmp_path / "seen", "--overlay-format", "html")
    assert code == 0
    assert "alternatives" not in json.loads(out)
    caption, name = json.loads(out), pictures[0].stem
    with Image.open(tmp_path / "seen" / f"{name}.gif") as animation:
        assert animation.n_frames == 1 + len(caption["words"])
    page = (tmp_path / "seen" / f"{name}.html").read_text()
    assert f"<title>{escape(caption['caption'])}</title>" in page
    assert page.count('class="word"') == len(caption["words"])
    assert "<br>or " not in page


def test_an_overlay_has_the_selected_colours(run, pictures, tmp_path):
    for colours in ("white", "viridis"):
        assert run(pictures[0], "--overlay", tmp_path / colours, "--overlay-colours", colours)[0] == 0
    white, viridis = (next((tmp_path / colours).iterdir()).read_bytes() for colours in ("white", "viridis"))
    assert white != viridis


@pytest.mark.parametrize("format", ["text", "jsonl", "csv"])
def test_an_interrupted_run_is_resumed(run, pictures, tmp_path, format):
    folder, whole, file = pictures[0].parent, tmp_path / "whole.out", tmp_path / "cut.out"
    command = [folder, "-f", format, "--candidates", 2]
    assert run(*command, "-o", whole)[0] == 0
    content = whole.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    code, _, err = run(*command, "-o", file)
    assert code == 0
    assert "pictures have captions already" in err
    digits = re.compile(rb"-\d+\.\d+")  # the last may differ with the pictures of a batch
    assert digits.sub(b"", file.read_bytes()) == digits.sub(b"", content)
    content = file.read_bytes()
    assert run(*command, "-o", file)[2] == "caption: 9 of 9 pictures have captions already\n"
    assert file.read_bytes() == content


@pytest.mark.parametrize("target", ["-o", "--sidecar", "--overlay"])
def test_nothing_to_do_loads_no_model(run, pictures, tmp_path, target, monkeypatch):
    value = {"-o": tmp_path / "out.txt", "--sidecar": ".txt", "--overlay": tmp_path / "seen"}[target]
    command = [*pictures[:2], target, value, "--failures", tmp_path / "failed"]
    assert run(*command)[0] == 0
    (tmp_path / "failed").write_text("from another run\n")
    monkeypatch.setattr("captioner.captioning.load", lambda *_, **__: pytest.fail("loaded"))
    assert run(*command) == (0, "", "caption: 2 of 2 pictures have captions already\n")
    assert (tmp_path / "failed").read_text() == ""


def test_existing_files_are_kept_if_the_model_cannot_be_loaded(run, pictures, tmp_path):
    for name in ("out.txt", "failed"):
        (tmp_path / name).write_text("precious")
    command = [*pictures[:2], "-o", tmp_path / "out.txt", "--failures", tmp_path / "failed", "--overwrite"]
    assert run(*command, "-m", tmp_path / "none.safetensors")[0] == 2
    assert (tmp_path / "out.txt").read_text() == (tmp_path / "failed").read_text() == "precious"


def test_only_missing_results_are_written(run, pictures, tmp_path):
    command = [pictures[0].parent, "-f", "jsonl", "-o", tmp_path / "out.jsonl", "--sidecar", ".txt"]
    command += ["--overlay", tmp_path / "seen"]
    assert run(*command)[0] == 0
    lines = (tmp_path / "out.jsonl").read_text()
    sidecar, overlay = pictures[4].with_suffix(".txt"), tmp_path / "seen" / f"{pictures[5].stem}.png"
    caption = sidecar.read_text()
    sidecar.unlink()
    overlay.unlink()
    assert run(*command)[2] == "caption: 7 of 9 pictures have captions already\n"
    assert sidecar.read_text() == caption
    assert overlay.exists()
    assert (tmp_path / "out.jsonl").read_text() == lines


def test_a_list_of_pictures_is_read_from_a_file_or_from_standard_input(run, pictures, tmp_path, monkeypatch):
    (tmp_path / "list").write_text(f"{pictures[2]}\r\n\n{pictures[0]}\n")
    code, out, _ = run(pictures[1], "--from-file", tmp_path / "list")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(pictures[number]) for number in (1, 2, 0)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{pictures[3]}\n".encode())))
    assert run("--from-file", "-")[1].startswith(f"{pictures[3]}\t")
    code, _, err = run("--from-file", tmp_path / "none")
    assert code == 2
    assert "none: cannot read this list of pictures" in err


def test_urls_are_captioned(run, pictures, tmp_path, website):
    for number in range(4):
        website.pages[f"/{number}.png"] = pictures[number].read_bytes()
    website.pages["/page.png"] = b"<html>A dog</html>"
    website.pages["/broken.png"] = pictures[4].read_bytes()[:-100]
    names = [f"{website.url}/{name}.png" for name in ("0", "none", "1", "page", "broken", "2")]
    (tmp_path / "list").write_text(f"{website.url}/3.png\n{pictures[4]}\n")
    command = [*names, "--from-file", tmp_path / "list", "-o", tmp_path / "out", "--overlay", tmp_path / "seen"]
    code, _, err = run(*command)
    assert code == 1
    assert [line.split(".png: ")[0] for line in err.splitlines()[:3]] == [
        f"caption: error: {website.url}/{name}" for name in ("none", "page", "broken")
    ]
    rows = [line.split("\t") for line in (tmp_path / "out").read_text().splitlines()]
    assert [name for name, _ in rows] == [names[0], names[2], names[5], f"{website.url}/3.png", str(pictures[4])]
    assert [text for _, text in rows] == [run(path)[1].strip() for path in pictures[:5]]
    assert sorted(path.stem for path in (tmp_path / "seen").iterdir()) == ["0", "1", "2", "3", pictures[4].stem]
    assert len(website.asked) == len(set(website.asked)) == 7  # once each, also those that were drawn on

    website.asked.clear()
    website.pages["/none.png"] = pictures[5].read_bytes()
    assert run(*command, "--failures", tmp_path / "failed")[0] == 1
    assert sorted(website.asked) == ["/broken.png", "/none.png", "/page.png"]
    assert (tmp_path / "failed").read_text() == f"{names[3]}\n{names[4]}\n"


def test_a_sidecar_of_a_url_is_an_error_and_the_run_continues(run, pictures, website):
    code, out, err = run(f"{website.url}/dog.jpg", pictures[0], "--sidecar", ".txt")
    assert (code, out.count("\n")) == (1, 1)
    assert f"{website.url}/dog.jpg: --sidecar needs files; nothing can be written beside this" in err
    assert not website.asked
    assert pictures[0].with_suffix(".txt").exists()


def test_shards_partition_the_pictures(run, pictures):
    shards = [run(*pictures, "--shard", f"{number}/4")[1].splitlines() for number in (1, 2, 3, 4)]
    assert [len(shard) for shard in shards] == [3, 2, 2, 2]
    assert sorted(itertools.chain(*shards)) == sorted(run(*pictures)[1].splitlines())


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_an_invalid_shard_is_refused(run, pictures, shard):
    code, _, err = run(*pictures, "--shard", shard)
    assert code == 2
    assert "--shard: expected K/N" in err


def test_failures_are_counted_and_listed(run, pictures, tmp_path):
    pictures[1].write_bytes(b"")
    pictures[3].write_bytes(b"no picture")
    code, _, err = run(*pictures, tmp_path / "no.jpg", "--failures", tmp_path / "failed")
    assert code == 1
    assert err.splitlines()[-1] == "caption: 3 of 10 pictures failed"
    names = [str(pictures[1]), str(pictures[3]), str(tmp_path / "no.jpg")]
    assert (tmp_path / "failed").read_text().splitlines() == names
    assert run("--from-file", tmp_path / "failed", "--failures", tmp_path / "failed")[0] == 1
    Image.new("RGB", (9, 9)).save(pictures[1])
    assert run("--from-file", tmp_path / "failed", "--failures", tmp_path / "failed")[0] == 1
    assert (tmp_path / "failed").read_text().splitlines() == names[1:]


def test_prefix_and_suffix_surround_every_caption(run, pictures):
    caption = run(pictures[0])[1].strip()
    assert run(pictures[0], "--prefix", "photo of ", "--suffix", ", indoors")[1] == f"photo of {caption}, indoors\n"
    command = [pictures[0], "-f", "jsonl", "--candidates", 2, "--prefix", "x "]
    row = json.loads(run(*command)[1])
    assert row["caption"] == f"x {caption}"
    assert row["candidates"][0]["caption"].startswith("x ")


def test_overlays_keep_the_subfolders_of_their_pictures(run, tmp_path):
    for name in ("a/dog.jpg", "b/c/dog.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        Image.new("RGB", (60, 40), "red").save(tmp_path / "photos" / name)
    assert run(tmp_path / "photos", "--overlay", tmp_path / "seen")[0] == 0
    seen = sorted(str(path.relative_to(tmp_path / "seen")) for path in (tmp_path / "seen").rglob("*.png"))
    assert seen == ["a/dog.png", "b/c/dog.png"]
