import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from captioner.bulk.plan import expand_braces, make_plan, read_plan, write_plan
from captioner.bulk.rows import Columns, Unit
from captioner.errors import CaptionerError, DataError
from tests.captioner.bulk.conftest import draw, write_shard


def plan(*names, size=4, **columns):
    return list(make_plan(map(str, names), Columns(**columns), size))


def test_braces_are_numbers_with_their_zeros_and_choices():
    assert list(expand_braces("a-{008..011}.tar")) == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert list(expand_braces("{a,b}/{1..2}")) == ["a/1", "a/2", "b/1", "b/2"]
    assert list(expand_braces("{name}-{1,2}")) == ["{name}-1", "{name}-2"]


def test_braces_that_count_down_are_refused():
    with pytest.raises(CaptionerError, match="counts down"):
        list(expand_braces("{9..1}.tar"))


def test_a_folder_of_pictures_is_cut_into_blocks_in_a_stable_order_without_what_is_hidden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.jpg", "b/1.png", "a.jpg", "c.jpg", ".hidden/x.jpg", "@eaDir/x.jpg", "notes.txt", "z/3.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files = ("photos/a.jpg", "photos/c.jpg", "photos/b/1.png", "photos/b/2.jpg", "photos/z/3.jpg")
    assert plan("photos") == [
        Unit("pictures", files[:4], rows=4),
        Unit("pictures", files[4:], rows=1),
    ]
    assert plan("photos/b/*.*") == [Unit("pictures", ("photos/b/1.png", "photos/b/2.jpg"), rows=2)]


def test_a_link_in_a_circle_is_not_followed(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "again").symlink_to(tmp_path)
    assert plan(tmp_path) == [Unit("pictures", (f"{tmp_path}/a.jpg",), rows=1)]


def test_shards_are_units_and_are_kept_apart_from_pictures(tmp_path):
    write_shard(tmp_path / "0.tar", [("a.png", draw(0))])
    write_shard(tmp_path / "1.tar", [("a.png", draw(1))])
    assert plan(f"{tmp_path}/{{0..1}}.tar", "http://example.org/a") == [
        Unit("shard", (f"{tmp_path}/0.tar",)),
        Unit("shard", (f"{tmp_path}/1.tar",)),
        Unit("pictures", ("http://example.org/a",), rows=1),
    ]


def test_row_groups_go_together_and_are_cut_where_they_hold_paths(tmp_path):
    values = [f"{number}.jpg" for number in range(20)]
    parquet.write_table(arrow.table({"path": values}), tmp_path / "paths.parquet", row_group_size=10)
    pictures = arrow.table({"image": [value.encode() for value in values]})
    parquet.write_table(pictures, tmp_path / "few.parquet", row_group_size=3)
    parquet.write_table(pictures, tmp_path / "many.parquet", row_group_size=10)

    def cuts(name):
        return [(unit.start, unit.rows) for unit in plan(tmp_path / name)]

    assert cuts("paths.parquet") == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 4)]
    assert cuts("few.parquet") == [(0, 6), (6, 6), (12, 6), (18, 2)]
    assert cuts("many.parquet") == [(0, 10), (10, 10)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "no such file or folder"),
        ("missing.tar", "no such file"),
        ("missing.parquet", "no such file"),
        ("*.jpg", "no pictures, shards"),
        ("empty", "no pictures, shards"),
        ("mixed", r"has pictures and shards.*\*\.tar"),
        ("nope://bucket/a.tar", "Protocol not known"),
    ],
)
def test_a_name_that_leads_to_nothing_is_told_in_one_line(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for file in ("a.jpg", "a.tar"):
        (tmp_path / "mixed" / file).touch()
    with pytest.raises(CaptionerError, match=said) as caught:
        plan(name)
    assert "\n" not in str(caught.value)


def test_tables_without_the_columns_are_refused(tmp_path):
    parquet.write_table(arrow.table({"x": [1], "a": [b""], "b": [b""]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"which column has the pictures.*x, a, b"):
        plan(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'x' has no pictures"):
        plan(tmp_path / "t.parquet", picture="x")
    with pytest.raises(DataError, match="no column 'name'"):
        plan(tmp_path / "t.parquet", picture="a", keep=("name",))


def test_a_plan_is_read_as_it_was_written(tmp_path):
    units = [Unit("pictures", ("a\udce9.jpg", "b.jpg"), rows=2), Unit("table", ("t",), 3, 4)]
    file = f"{tmp_path}/plan.gz"
    assert write_plan(file, units) == (2, 6)
    assert list(read_plan(file)) == units
    assert write_plan(file, [*units, Unit("shard", ("s",))]) == (3, None)
