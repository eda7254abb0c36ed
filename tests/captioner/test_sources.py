from pathlib import Path

import pytest
from PIL import Image

from captioner.sources import find_pictures, keep_apart


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.png", "trip/day 1/sea.jpg", "trip/[x].jpg", "notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(path) if path.suffix != ".txt" else path.write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def test_a_folder_gives_all_pictures_below_it_by_path_and_where_they_stood(folder):
    found, missing = find_pictures(["photos"])
    assert [each.name for each in found] == [
        "photos/a.png",
        "photos/b.jpg",
        "photos/trip/[x].jpg",
        "photos/trip/day 1/sea.jpg",
    ]
    assert [str(each.place) for each in found] == ["a", "b", "trip/[x]", "trip/day 1/sea"]
    assert not missing


def test_a_pattern_gives_the_pictures_that_fit(folder):
    found, missing = find_pictures(["photos/*", "photos/**/s*.jpg", "photos/*.gif"])
    assert [each.name for each in found] == ["photos/a.png", "photos/b.jpg", "photos/trip/day 1/sea.jpg"]
    assert [str(error) for error in missing] == ["photos/*.gif: no pictures fit this pattern"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(folder):
    (found,), _ = find_pictures(["photos/trip/[x].jpg"])
    assert found.name == "photos/trip/[x].jpg"


def test_files_come_as_they_are_named_whether_they_are_there_or_not(folder):
    found, missing = find_pictures(["photos/b.jpg", "no.jpg", "photos/b.jpg"])
    assert [each.name for each in found] == ["photos/b.jpg", "no.jpg", "photos/b.jpg"]
    assert not missing


def test_an_empty_folder_is_told_and_the_others_go_on(folder):
    (folder / "empty").mkdir()
    found, missing = find_pictures(["photos/empty", "photos/b.jpg"])
    assert [each.name for each in found] == ["photos/b.jpg"]
    assert [str(error) for error in missing] == ["photos/empty: no pictures in this folder"]


@pytest.mark.parametrize(
    ("places", "kept"),
    [
        (["dog", "cat"], ["dog", "cat"]),
        (["dog", "dog", "dog"], ["dog", "dog-2", "dog-3"]),
        (["dog", "dog", "dog-2"], ["dog", "dog-3", "dog-2"]),
        (["dog-2", "dog", "dog"], ["dog-2", "dog", "dog-3"]),
        (["a/dog", "b/dog", "a/dog"], ["a/dog", "b/dog", "a/dog-2"]),
    ],
)
def test_places_are_kept_apart(places, kept):
    assert keep_apart([Path(place) for place in places]) == [Path(place) for place in kept]


def test_pictures_of_the_folder_of_overlays_are_no_sources(folder):
    found, _ = find_pictures(["photos", "photos/trip/[x].jpg"], overlays=folder / "trip")
    assert [each.name for each in found] == ["photos/a.png", "photos/b.jpg", "photos/trip/[x].jpg"]


@pytest.mark.parametrize(
    ("address", "place"),
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
def test_an_address_is_a_picture_that_is_named_by_the_end_of_its_path(address, place):
    (found,), missing = find_pictures([address])
    assert (found.name, str(found.place)) == (address, place)
    assert not missing


def test_a_picture_on_the_web_is_fetched_when_it_is_read_and_kept_for_its_overlay(website):
    website.pages["/dog.jpg"] = b"a picture"
    for overlays, times in ((None, 2), (Path("seen"), 1)):
        (found,), _ = find_pictures([f"{website.url}/dog.jpg"], overlays)
        assert website.asked == []
        assert found.source() == found.source() == b"a picture"
        assert len(website.asked) == times
        website.asked.clear()
        found.source.forget()
        found.source()
        assert len(website.asked) == 1
        website.asked.clear()
