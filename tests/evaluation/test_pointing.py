import numpy as np
import pytest

from captioner.caption import Rectangle
from captioner.errors import DataError
from evaluation import pointing
from evaluation.pointing import object_shares

WHOLE = Rectangle(0, 0, 1, 1)


def attention_mass(attention, mask, rectangle=WHOLE):
    return pointing.attention_mass(attention, object_shares(mask, attention.shape, rectangle))


def points_at(attention, mask, rectangle=WHOLE):
    return pointing.points_at(attention, object_shares(mask, attention.shape, rectangle))


def drawn(size, rows, columns):
    mask = np.zeros(size, bool)
    mask[rows, columns] = True
    return mask


def peak(shape, cell):
    attention = np.zeros(shape)
    attention[cell] = 1
    return attention


@pytest.mark.parametrize("size", [(64, 64), (60, 90), (5, 7), (3, 2)])
def test_mass_is_that_of_the_map_stretched_over_the_mask(size):
    random = np.random.default_rng(0)
    attention = random.dirichlet(np.ones(6)).reshape(2, 3)
    mask = random.random(size) < 0.4
    # Both drawn so finely that every cell and every pixel is a whole number of points.
    fine_map = np.kron(attention / (size[0] * size[1]), np.ones(size))
    fine_mask = np.kron(mask, np.ones((2, 3)))
    assert attention_mass(attention, mask) == pytest.approx((fine_map * fine_mask).sum())


def test_uniform_attention_has_the_mass_of_the_area():
    mask = drawn((50, 70), slice(3, 21), slice(11, 40))
    assert attention_mass(np.full((7, 7), 1 / 49), mask) == pytest.approx(mask.mean())


def test_all_attention_on_the_object_is_a_mass_of_one_and_none_of_zero():
    mask = drawn((64, 64), slice(8, 16), slice(24, 32))
    assert attention_mass(peak((8, 8), (1, 3)), mask) == pytest.approx(1)
    assert attention_mass(peak((8, 8), (3, 1)), mask) == 0


def test_the_peak_hits_if_any_part_of_the_object_lies_in_its_cell():
    mask = drawn((64, 64), slice(8, 17), slice(24, 32))  # one row of pixels below cell (1, 3)
    assert points_at(peak((8, 8), (1, 3)), mask)
    assert points_at(peak((8, 8), (2, 3)), mask)
    for neighbour in ((0, 3), (1, 2), (1, 4), (3, 3)):
        assert not points_at(peak((8, 8), neighbour), mask)


def test_a_pixel_on_the_border_of_two_cells_is_part_of_both():
    mask = drawn((10, 10), 3, 0)  # rows 3 to 4; cells of ten thirds of a pixel end at 3.33
    assert points_at(peak((3, 3), (0, 0)), mask)
    assert points_at(peak((3, 3), (1, 0)), mask)
    assert attention_mass(peak((3, 3), (0, 0)), mask) == pytest.approx(0.03)


def test_ties_of_peaks_go_to_the_first():
    even = np.full((4, 4), 1 / 16)
    assert points_at(even, drawn((8, 8), 0, 0))
    assert not points_at(even, drawn((8, 8), 7, 7))


@pytest.mark.parametrize(
    ("rectangle", "rows", "columns"),
    [
        (Rectangle(0.25, 0, 0.75, 1), slice(2, 10), slice(6, 12)),  # a crop from the middle
        (Rectangle(0.5, 0.25, 1, 0.5), slice(4, 6), slice(9, 15)),
        (Rectangle(-0.25, 0, 1.25, 1), slice(2, 10), slice(0, 18)),  # a border left and right
        (Rectangle(-0.25, -0.25, 0.5, 0.75), slice(0, 8), slice(0, 9)),  # both
    ],
)
def test_a_map_of_a_part_is_measured_in_the_mask_cut_or_padded_to_it(rectangle, rows, columns):
    """The mask (8, 12) lies in a border of 2 pixels above and below, and 3 left and right, of nothing."""
    random = np.random.default_rng(0)
    mask = random.random((8, 12)) < 0.3
    bordered = np.pad(mask, ((2, 2), (3, 3)))
    part = bordered[rows, columns]
    for grid in [(7, 7), (2, 3), (4, 4)]:
        attention = random.dirichlet(np.ones(grid[0] * grid[1])).reshape(grid)
        assert attention_mass(attention, mask, rectangle) == pytest.approx(attention_mass(attention, part))
        for cell in np.ndindex(grid):
            assert points_at(peak(grid, cell), mask, rectangle) == points_at(peak(grid, cell), part)


@pytest.mark.parametrize(
    ("grid", "mask"),
    [
        ((2, 2, 2), np.ones((4, 4), bool)),
        ((2, 0), np.ones((4, 4), bool)),
        ((2, 2), np.ones((4, 4), np.uint8)),
        ((2, 2), np.ones(4, bool)),
        ((2, 2), np.ones((0, 4), bool)),
    ],
)
def test_invalid_shapes_and_types_are_rejected(grid, mask):
    with pytest.raises(DataError, match="expected a bool mask"):
        object_shares(mask, grid, WHOLE)
