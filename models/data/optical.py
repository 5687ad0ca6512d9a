"""Motion without weights: how far things move between two frames, by OpenCV's optical flow.

What is left of the difference of two frames once one is moved onto the other is how much of a jump
lies between them. Both numbers are ours; they are no LPIPS, and have ranges of their own.

Source: Farneback 2003, "Two-Frame Motion Estimation Based on Polynomial Expansion".
"""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skiparse.models.data.scorers import Compared

_SETTINGS = (0.5, 4, 15, 3, 5, 1.1, 0)  # pyramid, levels, window, rounds, polynomial, its sigma


class Flow:
    """Motion as the mean path of a pixel between two frames, over the diagonal of the picture."""

    measure = "flow"
    least = 0.1  # of the levels of grey

    def about(self) -> dict[str, str]:
        """What its numbers depend on."""
        return {"measure": self.measure, "opencv": cv2.__version__}

    def __call__(self, frames: Tensor) -> Compared:
        """As :class:`~skiparse.models.data.scorers.Pairs`."""
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames.numpy()]
        found = [_pair(*pair) for pair in itertools.pairwise(grey)]
        return Compared(*torch.tensor(found, dtype=torch.float64).reshape(-1, 2).T)


def _pair(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[float, float]:
    """Of two pictures ``[H, W]``: the path, and the difference that it leaves, in [0, 1]."""
    height, width = before.shape
    made = np.zeros((height, width, 2), np.float32)
    flow = cv2.calcOpticalFlowFarneback(before, after, made, *_SETTINGS)
    path = np.linalg.norm(flow.astype(np.float64), axis=2).mean() / math.hypot(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    moved = cv2.remap(after, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR,
                      borderMode=cv2.BORDER_REPLICATE)  # fmt: skip
    left = np.abs(moved.astype(np.float64) - before).mean() / 255
    return float(path), float(left)
