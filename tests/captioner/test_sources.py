import io
import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from captioner import images
from captioner.errors import CaptionerError
from captioner.sources import Found, NotFound, Skipped, find_pictures, fits_list, is_single, open_list

posix = pytest.mark.skipif(os.name != "posix", reason="links, FIFOs and names of POSIX")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.png", "trip/day 1/sea.jpg", "trip/[x].jpg", "notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(path) if path.suffix != ".txt" else path.write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def find(*names, **options):
    """Return the pictures, and what was not found as text."""
    found = list(find_pictures(names, **options))
    missing = [f"{item.name}: {item.reason}" for item in found if isinstance(item, NotFound)]
    return [item for item in found if isinstance(item, Found)], missing


def find_names(*names, **options):
    """Return the names of the pictures, of which none may be missing."""
    found, missing = find(*names, **options)
    assert not missing
    return [item.name for item in found]


def test_a_folder_gives_all_pictures_sorted_by_path(folder):
    found, missing = find("photos")
    assert [item.name for item in found] == [
        "photos/a.png",
        "photos/b.jpg",
        "photos/trip/[x].jpg",
        "photos/trip/day 1/sea.jpg",
    ]
    assert [str(picture.stem) for picture in found] == ["a", "b", "trip/[x]", "trip/day 1/sea"]
    assert not missing


@pytest.mark.parametrize("name", ["photos", "photos/", "./photos/", "photos/**", "photos/**/*", "./photos//**/*"])
def test_folders_and_patterns_find_the_same_pictures_in_the_order_of_their_paths(folder, name):
    for extra in ("c.png", "trip.jpg", "trip/z.png", "trip 2/y.png"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).touch()
    names = find_names(name)
    assert len(names) == 8
    assert names == [str(path) for path in sorted(Path(item) for item in names)]


def test_the_current_folder_is_not_part_of_the_names(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_names(".") == find_names("**/*") == ["a.png", "b.jpg", "trip/[x].jpg", "trip/day 1/sea.jpg"]
    assert find_names("../photos/*.png") == ["../photos/a.png"]


def test_a_pattern_gives_matching_pictures_without_duplicates(folder):
    found, missing = find("photos/*", "photos/**/s*.jpg", "photos/*.gif", "none/*.jpg")
    assert [item.name for item in found] == ["photos/a.png", "photos/b.jpg", "photos/trip/day 1/sea.jpg"]
    assert missing == ["photos/*.gif: no pictures match this pattern", "none/*.jpg: no pictures match this pattern"]
    assert find_names("**/trip/**/*.jpg") == ["photos/trip/[x].jpg", "photos/trip/day 1/sea.jpg"]
    assert find_names("**/**/day*/**/sea.jpg") == ["photos/trip/day 1/sea.jpg"]
    assert find_names(str(folder.absolute() / "[ab].*")) == [
        str(folder.absolute() / name) for name in ("a.png", "b.jpg")
    ]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(folder):
    assert find_names("photos/trip/[x].jpg") == ["photos/trip/[x].jpg"]
    assert is_single("photos/trip/[x].jpg")
    assert not is_single("photos/trip/[y].jpg")


def test_names_of_a_list_are_never_patterns(folder):
    assert find_names("photos/[ab].jpg", patterns=False) == ["photos/[ab].jpg"]


def test_files_are_found_by_name_even_if_missing(folder):
    assert find_names("photos/b.jpg", "no.jpg", "photos/b.jpg", "x" * 300) == [
        "photos/b.jpg",
        "no.jpg",
        "photos/b.jpg",
        "x" * 300,
    ]


def test_an_empty_folder_is_reported_and_the_scan_continues(folder):
    (folder / "empty").mkdir()
    found, missing = find("photos/empty", "photos/b.jpg")
    assert [item.name for item in found] == ["photos/b.jpg"]
    assert missing == ["photos/empty: no pictures in this folder"]


@posix
def test_links_cause_no_cycles_and_no_duplicates(folder):
    for name in ("loop", "trip/loop", "trip/day 1/loop"):
        (folder / name).symlink_to(folder.absolute())
    for name in ("photos", "photos/**/*"):
        skipped = Skipped()
        assert len(find_names(name, skipped=skipped)) == 4
        assert skipped.linked == 3
    # A link that the name itself leads through is followed, as the shell does.
    assert find_names("photos/lo*/*.png") == ["photos/loop/a.png"]
    assert find_names("photos/loop") == [
        f"photos/loop/{name}" for name in ("a.png", "b.jpg", "trip/[x].jpg", "trip/day 1/sea.jpg")
    ]


@posix
@pytest.mark.parametrize("name", ["photos", "photos/**/*"])
def test_hidden_broken_and_special_entries_are_skipped_and_counted(folder, name):
    for hidden in (".thumbs/t.png", "@eaDir/t.jpg", "trip/.cache/t.png", ".t.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(folder / hidden)
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(folder / "fifo.png")
    (folder / "linked.png").symlink_to("a.png")
    for other in ("i.heic", "j.HEIC", "k.jp2"):
        (folder / other).touch()
    skipped = Skipped()
    assert find_names(name, skipped=skipped) == [
        "photos/a.png",
        "photos/b.jpg",
        "photos/linked.png",
        "photos/trip/[x].jpg",
        "photos/trip/day 1/sea.jpg",
    ]
    assert (skipped.hidden, skipped.linked, skipped.special) == (3, 0, 3)
    assert skipped.formats == {".heic": 2, ".jp2": 1}


def test_hidden_pictures_are_found_by_explicit_patterns(folder):
    (folder / ".thumbs").mkdir()
    Image.new("RGB", (3, 2)).save(folder / ".thumbs" / "t.png")
    assert find_names("photos/.thumbs/*") == find_names("photos/.t*/*.png") == ["photos/.thumbs/t.png"]


@posix
def test_an_unreadable_folder_is_reported_and_the_scan_continues(folder, ordinary_user):
    (folder / "locked").mkdir(mode=0)
    for name in ("photos", "photos/**/*"):
        found, missing = find(name)
        assert len(found) == 4
        assert missing == ["photos/locked: cannot read this folder (Permission denied)"]
    assert find("photos/locked") == ([], ["photos/locked: cannot read this folder (Permission denied)"])
    (folder / "locked").chmod(0o700)


def test_a_folder_may_be_deeper_than_the_recursion_limit(tmp_path, monkeypatch):
    depth = 1200
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        os.mkdir("d")  # noqa: PTH102
        os.chdir("d")
    Image.new("RGB", (3, 2)).save("deep.png")
    os.chdir(tmp_path)
    (name,) = find_names(".")
    assert name == "d/" * depth + "deep.png"
    os.chdir("d/" * depth)
    os.remove("deep.png")  # noqa: PTH107
    for _ in range(depth):  # as pytest cannot remove so deep a folder
        os.chdir("..")
        os.rmdir("d")  # noqa: PTH106


def test_pictures_are_found_lazily(folder):
    def names():
        yield "photos/a.png"
        raise AssertionError("asked for too early")

    assert next(find_pictures(names())).name == "photos/a.png"


def test_pictures_in_the_folder_of_overlays_are_skipped(folder):
    names = find_names("photos", "photos/trip/[x].jpg", overlays=folder / "trip")
    assert names == ["photos/a.png", "photos/b.jpg", "photos/trip/[x].jpg"]
    (folder / "empty").mkdir()
    found, missing = find("photos", "photos/trip", overlays=folder)
    assert not found
    assert missing == [
        f"{name}: this folder is in the folder of --overlay. Choose another folder for the overlays."
        for name in ("photos", "photos/trip")
    ]


def test_standard_input_is_read_lazily(monkeypatch):
    found, _ = find("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a picture")))
    assert (found[0].kind, found[0].source()) == ("stream", b"a picture")
    assert images.name(found[0].source) == "standard input"


@posix
def test_a_fifo_is_a_stream(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (found,), _ = find(str(tmp_path / "fifo"))
    assert (found.kind, found.stem) == ("stream", Path("fifo"))


@pytest.mark.parametrize(
    ("address", "stem"),
    [
        ("https://example.org/trip/dog.jpg", "dog"),
        ("HTTP://example.org/my.dog.jpg?width=9/9#top", "my.dog"),
        ("https://example.org/H%C3%BCndchen%201.jpg", "Hündchen-1"),
        ("https://example.org/a%2F..%2F..%2Fb%00.jpg", "b"),
        ("https://example.org/" + "x" * 300 + ".jpg", "x" * 60),
        ("https://example.org/trip/", "example.org"),
        ("https://example.org", "example.org"),
        ("https://example.org/..", "picture"),
        ("https://", "picture"),
    ],
)
def test_a_url_is_named_after_the_end_of_its_path(address, stem):
    (found,), missing = find(address)
    assert (found.name, str(found.stem), found.kind) == (address, stem, "address")
    assert not missing


def test_a_url_is_downloaded_lazily_and_kept_for_its_overlay(website):
    website.pages["/dog.jpg"] = b"a picture"
    for overlays, times in ((None, 2), (Path("seen"), 1)):
        (found,), _ = find(f"{website.url}/dog.jpg", overlays=overlays)
        assert website.asked == []
        assert found.source() == found.source() == b"a picture"
        assert len(website.asked) == times
        website.asked.clear()
        found.source.forget()
        found.source()
        assert len(website.asked) == 1
        website.asked.clear()


def read(content, tmp_path, **options):
    (tmp_path / "list").write_bytes(content)
    with open_list(str(tmp_path / "list"), **options) as names:
        return list(names)


def test_a_list_has_a_name_on_each_line(tmp_path):
    assert read(b"a.png\r\n\n  \n b .png\nd\xe9.png", tmp_path) == ["a.png", " b .png", os.fsdecode(b"d\xe9.png")]
    assert read(b"", tmp_path) == read(b"\n\r\n", tmp_path) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_are_understood(tmp_path, encoding):
    mark = "\ufeff" if encoding[-3:] in ("-le", "-be") else ""
    names = [f"Hündchen {number}/\u0a0a\u0d0a.png" for number in range(20_000)]
    assert read((mark + "\r\n".join(names)).encode(encoding), tmp_path) == names


NAMES = ["a\nb.png", "\r\n", " ", "c.png\r", "\ufeffd.png", os.fsdecode(b"\xff\xfee.png"), "[x].png", "-"]


def test_names_between_nul_characters_may_contain_anything(tmp_path):
    content = b"".join(os.fsencode(name) + b"\0" for name in NAMES)
    assert read(content, tmp_path, null=True) == read(content[:-1], tmp_path, null=True) == NAMES


def test_a_name_fits_a_list_if_it_round_trips(tmp_path):
    for name in (*NAMES, "a.png", " b.png", "tab\t.png"):
        assert (read(os.fsencode(name) + b"\n", tmp_path) == [name]) >= fits_list(name)
    assert [name for name in NAMES if fits_list(name)] == ["[x].png", "-"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png\0b.png\0", "contains NUL characters. If names end with NUL, add --null"),
        ("a.png\nb.png".encode("utf-16-le"), "contains NUL characters"),
        (b"\xff\xfea\0\x00\xd8\n\0", "cannot read this list of pictures"),
        (b"x" * 200_000, "expected a list of names, got one of more than 65,536 characters"),
    ],
)
def test_an_invalid_list_is_an_error(tmp_path, content, message):
    with pytest.raises(CaptionerError, match=f"list: .*{message}"):
        read(content, tmp_path)


@pytest.mark.parametrize("file", ["none", ".", "x" * 300])
def test_a_list_that_cannot_be_opened_is_an_error(tmp_path, file):
    with pytest.raises(CaptionerError, match="cannot read this list of pictures"), open_list(str(tmp_path / file)):
        pass


def test_a_list_is_read_while_it_is_written(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        with open_list("-") as names:
            os.write(writing, b"a.png\nb.p")
            assert next(names) == "a.png"
            os.write(writing, b"ng\n")
            assert next(names) == "b.png"
            os.close(writing)
            assert list(names) == []


def test_the_first_of_a_million_names_is_immediate(tmp_path):
    with (tmp_path / "list").open("w") as file:
        file.writelines(f"photos/{number}.jpg\n" for number in range(1_000_000))
    started = time.process_time()
    with open_list(str(tmp_path / "list")) as names:
        assert next(find_pictures(names, patterns=False)).name == "photos/0.jpg"
    assert time.process_time() - started < 0.2
