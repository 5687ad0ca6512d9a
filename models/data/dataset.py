"""How rows of a manifest become clips: decoded at the training rate, in the bucket's shape."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from skiparse.models.data.buckets import Buckets, Rule
from skiparse.models.data.draws import Place, Use, numbers
from skiparse.models.data.image import read_image
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import DataError, Manifest, Record
from skiparse.models.data.video import VideoError, probe, read_video

_BAD_SHARE = 0.01  # of the files tried, above which a run stops
_JUDGED = 100  # files tried before that is asked
_TRIES = 20  # of other samples in place of one that cannot be read


@dataclass(frozen=True)
class Clip:
    """One sample.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``, RGB; T is 1 for an image.
        captions: at least one, none empty; none where the manifest has none.
        key: names the clip and the window of it, and no other.
        place: in the run, with the row that was read.
    """

    frames: Tensor
    captions: tuple[str, ...]
    key: str
    place: Place


class Clips(Dataset[Clip]):
    """The clips of a manifest, by :class:`~skiparse.models.data.draws.Place`.

    A clip depends on the seed, the place and the files alone, however many workers read it.

    Where a file cannot be read, or has less in it than the manifest says, another sample of its
    bucket takes its place, and its name goes to ``bad``. Each worker counts its own rows: once more
    than 1 % of those it tried are bad (of 100, or of all if there are fewer), it raises.

    Where the manifest only has an estimate of a file's length, its frames are counted when it is
    first read, and windows are of those.

    Args:
        manifest, buckets, rule: the rows, and their shapes by that rule.
        seed: of windows and replacements.
        windows: which part of a longer clip: "random", another one each time, or "fixed", which
            follows from the seed and the row, so that it can be kept.
        limits: the largest source to decode.
        chance: where random numbers come from, as :func:`~skiparse.models.data.draws.numbers`.
        bad: file that a JSON line is added to for every bad file: path, reason. None: nowhere.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    def __init__(
        self,
        manifest: Manifest,
        buckets: Buckets,
        rule: Rule,
        *,
        seed: int = 0,
        windows: Literal["random", "fixed"] = "random",
        limits: Limits | None = None,
        chance: Callable[[int, int, int, Use], np.random.Generator] = numbers,
        bad: str | os.PathLike[str] | None = None,
    ) -> None:
        if len(buckets.bucket) != len(manifest):
            raise ValueError(
                f"buckets are of {len(buckets.bucket)} rows and the manifest has {len(manifest)}; "
                "assign them anew"
            )
        if windows not in ("random", "fixed"):
            raise ValueError(f"windows must be random or fixed, got {windows!r}")
        self.manifest, self.buckets, self.rule = manifest, buckets, rule
        self.seed, self.windows, self.limits = seed, windows, limits
        self.bad, self._chance = None if bad is None else Path(bad), chance
        self.reasons: dict[int, str] = {}  # of the rows found bad in this process
        self._rows = int(buckets.counts.sum())
        self._counted: dict[int, Record] = {}  # rows whose manifest has an estimate
        self._seen = np.zeros(len(manifest), bool)
        self._tried = 0  # rows seen

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, place: Place) -> Clip:
        """The clip at ``place``, or one of its bucket in its stead.

        Raises:
            DataError: if too many files are bad, with the first reasons.
        """
        others = None
        for _ in range(_TRIES):
            clip = self._try(place)
            if clip is not None:
                return clip
            if others is None:
                bucket = self.buckets.bucket
                rows = np.flatnonzero(bucket == bucket[place.row])
                chance = self._chance(self.seed, place.step, place.index, Use.REPLACE)
                others = iter(chance.choice(rows, _TRIES))
            place = place._replace(row=int(next(others)))
        raise DataError(f"no clip could be read in {_TRIES} tries. {self._summary()}")

    def _try(self, place: Place) -> Clip | None:
        """The clip, or None if its file is bad, which is written down."""
        if not self._seen[place.row]:
            self._seen[place.row] = True
            self._tried += 1
        clip = None
        try:
            clip = self.read(place)
        except VideoError as error:
            self._note(place.row, str(error))
        share = len(self.reasons) / self._tried
        if share > _BAD_SHARE and self._tried >= min(_JUDGED, self._rows):
            raise DataError(f"{share:.1%} of the files tried are bad. {self._summary()}")
        return clip

    def read(self, place: Place) -> Clip:
        """The clip at ``place`` and no other; VideoError if it cannot be read."""
        bucket = int(self.buckets.bucket[place.row])
        if bucket < 0:
            raise ValueError(f"row {place.row} has no bucket: the rule or rarity drops it")
        frames, *size = self.buckets.shapes[bucket]
        record = self._record(place.row)
        key = f"{record.root.name}/{record.path}[{place.row}"
        if not record.is_video:
            image = read_image(
                record.path,
                size=(size[0], size[1]),
                crop=record.crop,
                root=record.root,
                limits=self.limits,
            )
            return Clip(image, record.captions, f"{key}]", place)
        interval = float(self.rule.interval(np.array(record.fps)))
        first = record.start + self._window(place, record, math.floor((frames - 1) * interval))
        clip = read_video(
            record.path,
            frames=frames,
            fps=record.fps / interval,
            size=(size[0], size[1]),
            start=first / record.fps,
            crop=record.crop,
            root=record.root,
            limits=self.limits,
            threads=1,
        )
        return Clip(clip, record.captions, f"{key}:{first}+{frames}]", place)

    def _record(self, row: int) -> Record:
        """The record of a row, its frames counted."""
        if row in self._counted:
            return self._counted[row]
        record = self.manifest.record(row)
        if record.exact:
            return record
        info = probe(record.path, root=record.root, limits=self.limits, whole=True)
        assert info.frames is not None
        if not info.fps or self.rule.interval(np.array(float(info.fps))) < 1:
            raise VideoError(
                f"{record.path!r}: {float(info.fps or 0):.3f} frames a second when counted, where "
                f"its container says {record.fps:.3f}; the rule asks for {self.rule.fps}"
            )
        record = replace(record, frames=info.frames, fps=float(info.fps), exact=True)
        self._counted[row] = record
        return record

    def _window(self, place: Place, record: Record, span: int) -> int:
        """The first frame to take, so that another ``span`` of the clip's come after it."""
        step, index = (place.step, place.index) if self.windows == "random" else (0, place.row)
        unit = self.rule.every or 1  # a file has so many series of every such frame; the first
        last = max(record.frames - 1 - span, 0) // unit
        chance = self._chance(self.seed, step, index, Use.WINDOW)
        return unit * int(chance.integers(last, endpoint=True))

    def _note(self, row: int, reason: str) -> None:
        """Remember that a row is bad. It is tried again: another window of it may be good."""
        known = row in self.reasons
        self.reasons.setdefault(row, reason)
        if known or self.bad is None:
            return
        record = self.manifest.record(row)
        line = json.dumps({"path": str(record.root / record.path), "reason": reason}) + "\n"
        file = os.open(self.bad, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())  # in one piece, so that workers do not mix theirs
        finally:
            os.close(file)

    def _summary(self) -> str:
        first = "; ".join(list(self.reasons.values())[:3])
        more = f", see {self.bad}" if self.bad else ""
        return f"The first reasons: {first}{more}. Mend or remove these files"
