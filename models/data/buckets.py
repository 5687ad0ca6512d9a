"""Which clips are trained on, and in which shapes: the min-max token strategy, vectorised.

A clip keeps its aspect, nearly, and its length, within limits on the number of pixels and frames;
clips of one shape make a bucket, and a batch is of one bucket. What bounds the memory of a step is
the number of tokens, so pixels are limited and not sides.

Source: Open-Sora Plan v1.3 report, "Dynamic training", and v1.5's data pipeline. Unlike there, no
clip is ever enlarged: a target fits into its clip in height and in width, not in area alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skiparse.models.data.draws import Use, numbers
from skiparse.models.data.manifest import FASTEST, DataError, Manifest
from skiparse.models.data.report import NAMED

RATIOS = ((9, 16), (3, 4), (1, 1), (4, 3), (16, 9))  # height : width

_SAME_FPS = 0.1  # frames per second within which two rates count as one
_ROWS = 2**20  # looked at together
_BITS = 20  # of a height or width in the code of a shape
_MOST_SHAPES = 2**15
_RARE = "of a rare shape"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which clips are taken, and what shapes they get.

    Sizes follow from ``size`` or from ``max_pixels``, of which one must be given.

    Args:
        frames: of a clip, a multiple of ``temporal_factor`` plus 1.
        fps: frames per second to train on. Files within 0.1 of it are taken as they are, faster
            ones are resampled, slower ones dropped.
        every: instead, take every so many frames of a file, whatever its rate.
        size: height and width that every clip gets; smaller clips are dropped.
        max_pixels: height x width of a clip at most; larger clips are scaled down.
        min_pixels: at least; smaller clips are dropped. A quarter of ``max_pixels`` if None.
        five_ratios: with ``max_pixels``: whether clips are cut to the nearest of :data:`RATIOS`,
            which keeps buckets few; if not, they keep their own.
        stride: heights and widths are multiples of it, in pixels.
        min_aspect, max_aspect: height / width of the clips that are taken.
        min_frames: of a clip that is shorter than ``frames``, after it was cut to a length that
            ``temporal_factor`` and ``sequence_parallel`` allow. Images always have one.
        drop_short: share of the clips shorter than ``frames`` that is dropped.
        longest: a clip with more than so many times ``frames`` is dropped.
        temporal_factor: frames that become one in the latent, after the first.
        sequence_parallel: processes that share a clip; its latent frames are a multiple.
        minority: a bucket with fewer than so many global batches is dropped.

    Raises:
        ValueError: for values that make no sense, alone or together.
    """

    frames: int = 1
    fps: float = 24.0
    every: int | None = None
    size: tuple[int, int] | None = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    five_ratios: bool = True
    stride: int = 16
    min_aspect: float = 0.5
    max_aspect: float = 2.0
    min_frames: int = 1
    drop_short: float = 1.0
    longest: float = 5.0
    temporal_factor: int = 8
    sequence_parallel: int = 1
    minority: int = 4

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "min_frames", "temporal_factor", "sequence_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.fps <= FASTEST:
            raise ValueError(f"fps must be above 0 and at most {FASTEST}, got {self.fps}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 0 <= self.drop_short <= 1:
            raise ValueError(f"drop_short must be in [0, 1], got {self.drop_short}")
        if not 0 < self.min_aspect <= self.max_aspect < math.inf:
            raise ValueError(
                "min_aspect must be above 0 and at most max_aspect, got "
                f"{self.min_aspect} and {self.max_aspect}"
            )
        if not self.longest >= 1:
            raise ValueError(f"longest must be at least 1, got {self.longest}")
        if self.minority < 0:
            raise ValueError(f"minority must be at least 0, got {self.minority}")
        self._check_frames()
        self._check_size()

    def _check_frames(self) -> None:
        unit = self.temporal_factor * self.sequence_parallel
        if self.kept_frames(self.frames) != self.frames:
            below = self.kept_frames(self.frames)
            near = [frames for frames in (below, below + unit) if frames >= 1]
            raise ValueError(
                f"frames={self.frames} do not fill latent frames in multiples of "
                f"{self.sequence_parallel}; try {' or '.join(map(str, near))}"
            )
        if self.min_frames > self.frames:
            raise ValueError(f"min_frames={self.min_frames} must be at most frames={self.frames}")

    def _check_size(self) -> None:
        if (self.size is None) == (self.max_pixels is None):
            raise ValueError(
                f"one of size and max_pixels must be given, got {self.size} and {self.max_pixels}"
            )
        if self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))  # JSON makes it a list
            if self.min_pixels is not None:
                raise ValueError("min_pixels has no effect with size; leave it out")
            if any(side < 1 or side % self.stride for side in self.size):
                raise ValueError(f"size must be of multiples of {self.stride}, got {self.size}")
        if self.max_pixels is not None:
            least = self.stride**2 if self.min_pixels is None else self.min_pixels
            if not 1 <= least <= self.max_pixels:
                raise ValueError(
                    f"max_pixels={self.max_pixels} must be at least {least}, and min_pixels at "
                    "least 1"
                )

    def interval(self, fps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Frames of a file from one that is taken to the next; below 1 if it is too slow."""
        if self.every is not None:
            return np.full_like(fps, self.every)
        return np.where(np.abs(fps - self.fps) < _SAME_FPS, 1.0, fps / self.fps)

    def table(self) -> dict[str, Any]:
        """All of it by name, as for ``Rule(**table)``; of ``every`` only where it is asked for.

        So the rule of a cache or a run from before there was ``every`` is the same as now.
        """
        found = asdict(self)
        if self.every is None:
            del found["every"]
        return found

    def kept_frames(self, frames: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """The largest allowed length up to ``frames``, at least 1; below 1 if there is none."""
        latent = ((frames - 1) // self.temporal_factor + 1) // self.sequence_parallel
        return (latent * self.sequence_parallel - 1) * self.temporal_factor + 1


@dataclass(frozen=True)
class Buckets:
    """Which rows have the same shape.

    Attributes:
        shapes: frames, height and width of each bucket.
        bucket: int16 ``[N]``, number of the bucket of each row; -1 if the row is dropped.
        dropped: how many rows are, by reason.
        examples: the first of these rows, for each reason.
    """

    shapes: tuple[tuple[int, int, int], ...]
    bucket: NDArray[np.int16]
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each bucket."""
        return np.bincount(self.bucket[self.bucket >= 0], minlength=len(self.shapes))


def assign(manifest: Manifest, rule: Rule, seed: int) -> Buckets:
    """The bucket of every row of ``manifest``.

    What is left to chance by ``rule.drop_short`` follows from the seed and the row.

    Raises:
        DataError: if no row is left, with the reasons.
    """
    codes = np.empty(len(manifest), np.int64)
    dropped: Counter[str] = Counter()
    examples: dict[str, list[int]] = {}
    luck = numbers(seed, 0, 0, Use.SHORT)
    for start in range(0, len(manifest), _ROWS):
        rows = slice(start, start + _ROWS)
        part = codes[rows]
        shape = _shapes(manifest, rows, rule)
        part[:] = (shape[0] << 2 * _BITS) + (shape[1] << _BITS) + shape[2]
        for reason, wrong in _reasons(manifest, rows, rule, shape, luck.random(len(part))).items():
            new = wrong & (part >= 0)
            part[new] = -1
            dropped[reason] += int(np.count_nonzero(new))
            named = examples.setdefault(reason, [])
            named += (start + np.flatnonzero(new)[: NAMED - len(named)]).tolist()
    found = np.unique(codes)
    found = found[found >= 0]
    if not len(found):
        raise DataError(f"no clip is left: {_listed(dropped)}; change the rule")
    if len(found) > _MOST_SHAPES:
        raise DataError(
            f"{len(found)} shapes are too many for batches of one shape; set five_ratios=True"
        )
    bucket = np.where(codes < 0, -1, np.searchsorted(found, codes)).astype(np.int16)
    side = (1 << _BITS) - 1
    shapes = tuple(
        (int(code >> 2 * _BITS), int(code >> _BITS & side), int(code & side)) for code in found
    )
    return Buckets(
        shapes,
        bucket,
        {reason: n for reason, n in dropped.items() if n},
        {reason: rows for reason, rows in examples.items() if rows},
    )


def without_minority(buckets: Buckets, global_batch: int | Sequence[int], rule: Rule) -> Buckets:
    """``buckets`` without those of fewer than ``rule.minority`` global batches.

    Args:
        global_batch: samples in a step; or for each bucket, if they differ.

    Raises:
        DataError: if none is left.
    """
    counts = buckets.counts
    few = counts < rule.minority * np.asarray(global_batch)
    if few.all():
        raise DataError(
            f"no bucket has the {rule.minority} global batches of {global_batch} samples that the "
            f"rule asks for, the largest has {counts.max()} samples; lower minority or the batch"
        )
    kept = np.flatnonzero(~few)
    number = np.full(len(counts) + 1, -1, np.int16)  # the last is for rows already dropped
    number[kept] = np.arange(len(kept))
    rare = np.isin(buckets.bucket, np.flatnonzero(few))
    dropped = {_RARE: int(counts[few].sum())} if few.any() else {}
    named = {_RARE: np.flatnonzero(rare)[:NAMED].tolist()} if few.any() else {}
    return replace(
        buckets,
        shapes=tuple(buckets.shapes[i] for i in kept),
        bucket=number[buckets.bucket],
        dropped={**buckets.dropped, **dropped},
        examples={**buckets.examples, **named},
    )


_Shape = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _shapes(manifest: Manifest, rows: slice, rule: Rule) -> _Shape:
    """Frames, height and width that clips would get; whatever comes, of those to be dropped."""
    height = manifest.height[rows].astype(np.int64)
    width = manifest.width[rows].astype(np.int64)
    frames = np.where(manifest.is_video[rows], _resampled(manifest, rows, rule), 1)
    frames = np.maximum(rule.kept_frames(np.minimum(frames, rule.frames)), 0)
    if rule.size is not None:
        return frames, np.full_like(height, rule.size[0]), np.full_like(width, rule.size[1])
    assert rule.max_pixels is not None
    if rule.five_ratios:
        return frames, *_nearest_ratio(height, width, rule.max_pixels, rule.stride)
    return frames, *_fitting(height, width, height, width, rule.max_pixels, rule.stride)


def _resampled(manifest: Manifest, rows: slice, rule: Rule) -> NDArray[np.int64]:
    """Frames at the rate of the rule."""
    ratio = manifest.frames[rows] / np.maximum(rule.interval(manifest.fps[rows]), 1e-6)
    return np.ceil(ratio - 1e-6).astype(np.int64)  # so that rounding makes no frame


def _nearest_ratio(
    height: NDArray[np.int64], width: NDArray[np.int64], most: int, stride: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The largest exact multiple of the nearest ratio and the stride; near it if there is none."""
    values = np.array([high / wide for high, wide in RATIOS])
    nearest = np.searchsorted((values[1:] + values[:-1]) / 2, height / width)
    high, wide = np.array(RATIOS)[nearest].T
    most_times = np.array([math.isqrt(most // (h * w * stride**2)) for h, w in RATIOS])
    times = np.minimum(height // (high * stride), width // (wide * stride))
    times = np.minimum(times, most_times[nearest])
    near = _fitting(height, width, high, wide, most, stride)
    return (
        np.where(times > 0, high * times * stride, near[0]),
        np.where(times > 0, wide * times * stride, near[1]),
    )


def _fitting(
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    high: NDArray[np.int64],
    wide: NDArray[np.int64],
    most: int,
    stride: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The largest size of the ratio ``high : wide`` in a clip, each side cut to the stride."""

    def root(square: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.sqrt(square).astype(np.int64)

    tall = np.minimum(np.minimum(height, width * high // wide), root(most * high // wide))
    broad = np.minimum(np.minimum(width, height * wide // high), root(most * wide // high))
    return tall // stride * stride, broad // stride * stride


def _reasons(
    manifest: Manifest, rows: slice, rule: Rule, shape: _Shape, luck: NDArray[np.float64]
) -> dict[str, NDArray[np.bool_]]:
    """Which rows are dropped, by reason; ``luck`` is uniform in [0, 1)."""
    height, width, frames = manifest.height[rows], manifest.width[rows], manifest.frames[rows]
    is_video = manifest.is_video[rows] > 0
    interval = rule.interval(manifest.fps[rows])
    aspect = height / width
    if rule.size is not None:
        small = (height < rule.size[0]) | (width < rule.size[1])
    else:
        assert rule.max_pixels is not None
        least = rule.max_pixels // 4 if rule.min_pixels is None else rule.min_pixels
        small = shape[1] * shape[2] < max(least, 1)
    short = is_video & (_resampled(manifest, rows, rule) < rule.frames)
    return {
        "aspect out of range": (aspect < rule.min_aspect) | (aspect > rule.max_aspect),
        "too small": small,
        "too large": (height >= 1 << _BITS) | (width >= 1 << _BITS),
        "fps too low": is_video & (interval < 1),
        "too long": is_video & (frames > rule.longest * rule.frames * interval),
        "too short": short & (luck < rule.drop_short),
        "too few frames": (shape[0] < 1) | (is_video & (shape[0] < rule.min_frames)),
    }


def _listed(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
