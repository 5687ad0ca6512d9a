"""Whether two folders hold the same videos, but for rounding."""

import av
import numpy as np


def frames(path):
    """``[frames, height, width, 3]``, levels from 0 to 255."""
    with av.open(path) as file:
        return np.stack([x.to_ndarray(format="rgb24") for x in file.decode(video=0)]).astype(int)


def same(one, two, number=2):
    """The same records, and frames that differ by the rounding of a level in a few pixels."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert len(names) == 2 * number
    for name in names:
        if name.endswith(".json"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
        else:
            a, b = (frames(folder / name) for folder in (one, two))
            assert a.shape == b.shape
            assert abs(a - b).max() <= 2
            assert (a != b).mean() < 0.01
            assert a.std() > 1
