"""Perceptually uniform colour maps: viridis, magma and cividis.

viridis and magma: Stéfan van der Walt and Nathaniel Smith, CC0. cividis: Nuñez, Anderton and Renslow 2018, PLOS ONE
13(7). This module has some of the 256 entries of matplotlib's tables. Linear interpolation gives the others with
errors below 1/255.
"""

import numpy as np

_ENTRIES = {
    "viridis": """
        00440154 0e481668 1d482979 2c443b84 393e4a89 4638598c 5a2e6d8e 7126828e 8120928c 8f1f9f88
        9420a386 9a23a983 a22ab07f aa35b779 b344bf70 bc56c667 c66ccd5a d084d44b e7c0df25 eed2e21b
        f2dde318 f6e7e419 faf1e51d fffde725
    """,
    "magma": """
        00000004 04020109 0d07061c 1d19103f 26251255 2f341069 36400f74 3d4c117a 465a167e 516b1d81
        5f812581 6b942c80 81b83779 98dc4869 a4eb5760 aff4695c b8f9795d c2fc8c63 cffea571 ddfebf84
        ecfdda9c fffcfdbf
    """,
    "cividis": """
        0000224e 1300306f 15003170 17013271 1c123570 221e3a6f 2b2b406d 3436466c 4245506c 54565c6d
        6b6b6d72 7e7b7a78 938f8a78 a49f9775 b3aea371 c0bcae6c cdc9b965 dbd9c55c e8e7d150 f3f3db42
        fbfde334 fcfee434 fffee838
    """,
}
"""Entries of each table: index, red, green and blue, two hexadecimal digits each."""

COLOUR_MAPS = tuple(_ENTRIES)
"""Names of the colour maps."""


def apply_colour_map(name: str, values: np.ndarray) -> np.ndarray:
    """Return the colours of values (...), 0 (dark) to 1 (bright): float64 (..., 3), red, green and blue, 0 to 1."""
    table = np.frombuffer(bytes.fromhex(_ENTRIES[name]), np.uint8).reshape(-1, 4) / 255
    indices, *channels = table.T
    return np.stack([np.interp(values, indices, channel) for channel in channels], axis=-1)
