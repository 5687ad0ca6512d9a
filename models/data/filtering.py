"""Which pieces of clips are kept by their scores, and with which captions; v1.3's rules by default.

The scores are of :mod:`skiparse.models.data.scoring`. What is kept becomes annotations, with the
cuts and crops that were found, and a report tells what went and shows it.

Source: Open-Sora Plan v1.3 report, data.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from skiparse.models.data import page
from skiparse.models.data.atomic import check_writable, read_table, replacing
from skiparse.models.data.importing import SOURCE, check_root
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import DataError, Manifest, Record
from skiparse.models.data.report import Dropped, Report
from skiparse.models.data.scoring import ABOUT, INDEX, SCHEMA, SCORES, digest, part_files
from skiparse.models.plain_yaml import read_yaml

PUBLISHED = Path(__file__).parent / "v1.3.yaml"
REPORT, PAGE = "filter.json", "filter.html"

Range = tuple[float | None, float | None]
_CROPPED = "motion_cropped"
_NO_MOTION = "too short for its motion"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is kept.

    Attributes:
        motion: least and most of each measure of motion; after a crop, the least again.
        aesthetic, technical, brightness: least and most; None leaves the score out.
        min_side: pixels of the shorter side.
        min_frames: of a piece.
        cut_captions: whether pieces between two cuts stay, whose captions are of the whole clip.
        above: aesthetic score from which on captions get the prefix.
        prefix: put in front of them.
        openings: taken off the front of captions, without regard to case.
    """

    motion: Mapping[str, Range | None]
    aesthetic: Range | None
    technical: Range | None
    brightness: Range | None
    min_side: int
    min_frames: int
    cut_captions: bool
    above: float
    prefix: str
    openings: tuple[str, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str] = PUBLISHED) -> Thresholds:
        """From YAML that looks as ``models/data/v1.3.yaml``; what is not in it is as there.

        Raises:
            ValueError: for what makes no sense, with the file and the key.
            OSError: if it cannot be read.
        """
        found = dict(_table(PUBLISHED))
        given = _table(Path(path))
        for name, value in given.items():
            if name not in found:
                raise ValueError(f"{path}: there is no {name!r}; give {', '.join(found)}")
            both = isinstance(value, dict) and isinstance(found[name], dict)
            found[name] = {**found[name], **value} if both else value
        where = os.fspath(path)
        motion, high = found["motion"], found["high_aesthetic"]
        if not isinstance(motion, dict):
            raise ValueError(f"{where}: motion must be a range of each measure, got {motion!r}")
        if not isinstance(high, dict) or high.keys() != {"above", "prefix"}:
            raise ValueError(f"{where}: high_aesthetic must have above and prefix, got {high!r}")
        texts = found["openings"]
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(f"{where}: openings must be texts, got {texts!r}")
        if not isinstance(high["prefix"], str) or not _is_number(high["above"]):
            raise ValueError(f"{where}: high_aesthetic must be a number and a text, got {high!r}")
        for name in ("min_side", "min_frames"):
            if type(found[name]) is not int or found[name] < 1:
                raise ValueError(
                    f"{where}: {name} must be a whole number from 1, got {found[name]!r}"
                )
        if type(found["cut_captions"]) is not bool:
            raise ValueError(
                f"{where}: cut_captions must be true or false, got {found['cut_captions']!r}"
            )
        ranges = {
            name: _range(found[name], f"{where}: {name}")
            for name in ("aesthetic", "technical", "brightness")
        }
        return cls(
            motion={name: _range(each, f"{where}: motion.{name}") for name, each in motion.items()},
            **ranges,
            min_side=found["min_side"],
            min_frames=found["min_frames"],
            cut_captions=found["cut_captions"],
            above=float(high["above"]),
            prefix=high["prefix"],
            openings=tuple(texts),
        )


def _table(path: Path) -> dict[str, Any]:
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a table of thresholds")
    return found


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _range(value: Any, where: str) -> Range | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} must be [least, most] or null, got {value!r}")
    if not all(each is None or _is_number(each) for each in value):
        raise ValueError(f"{where} must be of numbers or null, got {value!r}")
    least, most = value
    if least is not None and most is not None and least > most:
        raise ValueError(f"{where}: {least} is more than {most}")
    return least, most


@dataclass(frozen=True)
class _Rule:
    """One score and its range, in the order in which they are asked."""

    score: str
    least: float | None
    most: float | None
    below: str  # the reason
    above: str


def filtered(
    scores: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    thresholds: Thresholds | None = None,
    without: Collection[str] = (),
    shown: int = 4,
    limits: Limits | None = None,
) -> Report:
    """Write annotations of what is kept, and a report.

    ``out`` gets a ``data.txt`` with annotations for each root, ``filter.json`` with counts and
    histograms, and ``filter.html``, which shows both, and the pieces nearest to each threshold.

    Args:
        scores: a folder of :func:`~skiparse.models.data.scoring.score`, complete.
        out: another folder.
        thresholds: by default those published.
        without: of ``text``, ``aesthetic`` and ``technical``, what was not scored and is not to be
            asked for.
        shown: pieces at each side of a threshold, as pictures.
        limits: as for reading them.

    Raises:
        DataError: before any work, for scores that are incomplete, of something else by now, or
            lack what is asked; if nothing is kept, with the reasons.
    """
    scores, out = Path(scores), Path(out)
    asked = thresholds or Thresholds.read()
    if not (scores / ABOUT).is_file():
        raise DataError(f"{scores} has no {ABOUT}; make scores by `skiparse data score`")
    about = read_table(scores / ABOUT)
    rules = _rules(about["scorers"], asked, without, scores)
    parts = _parts(scores, about)
    manifest = Manifest.open(about["source"], index=scores / INDEX, limits=limits)
    if manifest.fingerprint != about["fingerprint"]:
        raise DataError(
            f"{about['source']} is not what {scores} has scores of; score it anew, elsewhere"
        )
    if out.resolve() == scores.resolve():
        raise DataError(f"out={out} is the folder of the scores; take another")
    for root in manifest.roots:
        check_root(root)
    check_writable(out / SOURCE, out / PAGE)
    limits = limits or Limits()
    dropped, counts = Dropped(), Counter[str]()
    with ExitStack() as stack:
        files = [
            stack.enter_context(
                stack.enter_context(replacing(out / _name(number))).open("w", encoding="utf-8")
            )
            for number in range(len(manifest.roots))
        ]
        kept: list[bool] = []
        ends: list[int] = []  # of the parts, among all pieces
        values: dict[str, list[NDArray[np.float32]]] = {name: [] for name in SCORES}
        for table in _tables(parts):
            ends.append(len(kept) + len(table))
            for name in SCORES:
                values[name].append(table[name].to_numpy().astype(np.float32))
            reasons = _why(table, manifest, asked, rules)
            for at, piece in enumerate(table.to_pylist()):
                record, reason = manifest.record(piece["row"]), reasons[at]
                captions: list[str] = []
                if reason is None:
                    captions = _captions(record, piece, asked, counts)
                    reason = None if captions else "no caption but an opening"
                kept.append(reason is None)
                if reason is not None:
                    dropped.add(reason, f"{record.path}{_told(piece)}")
                    continue
                line = json.dumps(_line(record, piece, captions))
                files[manifest.roots.index(record.root)].write(line + "\n")
                _count(record, piece, counts)
        if not any(kept):
            lost = ", ".join(f"{count} {reason}" for reason, count in dropped.counts.items())
            raise DataError(f"nothing of {scores} is kept: {lost or 'it has no pieces'}")
    with replacing(out / SOURCE) as temporary:
        lines = (f"{root},{_name(number)}\n" for number, root in enumerate(manifest.roots))
        temporary.write_text("".join(lines), encoding="utf-8")
    charts = _charts(values, np.array(kept, bool), rules)
    told = {**counts, "scorers": about["scorers"], "histograms": [c.told() for c in charts]}
    report = Report(str(scores), sum(kept), dropped.counts, dropped.examples, told)
    report.write(out / REPORT)

    def piece_of(number: int) -> tuple[Record, dict[str, Any]]:
        part = bisect_right(ends, number)
        table = parquet.read_table(parts[part], schema=SCHEMA)
        (found,) = table.slice(number - ends[part] + len(table), 1).to_pylist()
        return manifest.record(found["row"]), found

    page.write(out / PAGE, report, charts, piece_of, shown, limits)
    return report


def _name(root: int) -> str:
    return f"clips-{root}.jsonl"


def _rules(
    scorers: Mapping[str, Any], asked: Thresholds, without: Collection[str], scores: Path
) -> list[_Rule]:
    """The scores to be asked for, in order; DataError for what was not scored, or has no range."""
    known = ("text", "aesthetic", "technical")
    if set(without) - set(known):
        raise DataError(f"without must be of {', '.join(known)}, got {', '.join(without)}")
    for name in known:
        wanted = name == "text" or getattr(asked, name) is not None
        if scorers[name] is None and wanted and name not in without:
            raise DataError(
                f"{scores} has no scores of {name}: score with --{name} FILE, to another folder, "
                f"or go without: --without {name}"
            )
        if scorers[name] is not None and name in without:
            raise DataError(f"{scores} has scores of {name}; leave it out of --without")
    measure = scorers["motion"]["measure"]
    if measure not in asked.motion:
        raise DataError(
            f"motion was measured by {measure}, of which the thresholds have no range: those are "
            f"of {', '.join(asked.motion)}. Give --thresholds a file with motion: "
            f"{{{measure}: [least, most]}}, or {measure}: null to go without"
        )
    ranges = [
        ("motion", asked.motion[measure], "nearly static", "jitters, or moves too much"),
        ("aesthetic", asked.aesthetic, "aesthetic too low", "aesthetic too high"),
        ("technical", asked.technical, "technical quality too low", "technical quality too high"),
        (_CROPPED, asked.motion[measure], "nearly static without its text", ""),
        ("brightness", asked.brightness, "too dark", "too bright"),
    ]
    found = []
    for name, limits, below, above in ranges:
        if limits is not None and name not in without:
            most = None if name == _CROPPED else limits[1]
            found.append(_Rule(name, limits[0], most, below, above))
    return found


def _parts(scores: Path, about: dict[str, Any]) -> list[Path]:
    """All parts; DataError if some are missing, or are of something else."""
    parts, wanted = part_files(scores, about), digest(about).encode()
    missing = [path for path in parts if not path.exists()]
    if missing:
        raise DataError(
            f"{scores} is not complete: {len(missing)} of {len(parts)} parts are missing; run "
            "`skiparse data score` again, every share of it"
        )
    for path in parts:
        try:
            metadata = parquet.read_schema(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it, and score again") from error
        if metadata.get(b"of") != wanted:
            raise DataError(f"{path} is of other scores; remove it, and score again")
    return parts


def _tables(parts: Sequence[Path]) -> Iterator[pa.Table]:
    for path in parts:
        try:
            yield parquet.read_table(path, schema=SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it, and score again") from error


def _why(
    table: pa.Table, manifest: Manifest, asked: Thresholds, rules: Sequence[_Rule]
) -> list[str | None]:
    """Why each piece is not kept, or None: the first reason that there is."""
    reasons, free = np.full(len(table), None, object), np.ones(len(table), bool)

    def drop(wrong: NDArray[np.bool_], reason: str) -> None:
        reasons[wrong & free] = reason
        free[wrong] = False

    column = {name: table[name].to_numpy() for name in (*SCORES, "frames", "height", "width")}
    image = manifest.is_video[table["row"].to_numpy()] == 0
    drop(table["error"].is_valid().to_numpy(), "cannot be read")
    drop(~image & (column["frames"] < asked.min_frames), "shorter than min_frames")
    if not asked.cut_captions:
        row = table["row"].to_numpy()
        counted = manifest.is_video[row] == 1
        drop(counted & (column["frames"] < manifest.frames[row]), "captions of the whole clip")
    for rule in rules:
        value = column[rule.score]
        asked_for = ~image if rule.score != "brightness" else np.ones(len(table), bool)
        if rule.score == "motion":
            drop(asked_for & np.isnan(value), _NO_MOTION)
        if rule.least is not None:
            drop(asked_for & (value < rule.least), rule.below)
        if rule.most is not None:
            drop(asked_for & (value > rule.most), rule.above)
    drop(np.minimum(column["height"], column["width"]) < asked.min_side, "smaller than min_side")
    return reasons.tolist()


def _told(piece: Mapping[str, Any]) -> str:
    """What more there is to say of a piece that goes."""
    if piece["error"]:
        return f": {piece['error']}"
    scores = ", ".join(f"{n} {piece[n]:.4g}" for n in SCORES if piece[n] is not None)
    return f" from frame {piece['start']}, {piece['frames']} long: {scores}"


def _captions(
    record: Record, piece: Mapping[str, Any], asked: Thresholds, counts: Counter[str]
) -> list[str]:
    """Those of a piece, without openings, with the prefix if it looks that well."""
    found = []
    for caption in record.captions:
        text = without_opening(caption, asked.openings)
        counts["captions without their opening"] += text != caption
        if text:
            found.append(text)
    score = piece["aesthetic"]
    if score is not None and score > asked.above and asked.prefix:
        counts["clips of high aesthetic"] += 1
        found = [f"{asked.prefix}{text}" for text in found]
    return found


def without_opening(caption: str, openings: Sequence[str]) -> str:
    """A caption without the longest of these that it begins with, and a capital in front."""
    fitting = [each for each in openings if caption.lower().startswith(each.lower())]
    if not fitting:
        return caption
    rest = caption[len(max(fitting, key=len)) :].strip()
    return rest[:1].upper() + rest[1:]


def _line(record: Record, piece: Mapping[str, Any], captions: list[str]) -> dict[str, Any]:
    """The annotation of a piece."""
    top, left, height, width = (piece[name] for name in ("top", "left", "height", "width"))
    line: dict[str, Any] = {"path": record.path, "cap": captions}
    line["resolution"] = {"height": height, "width": width}
    if top >= 0:  # the whole picture may be larger; what is used has to be inside
        line["resolution"] = {"height": top + height, "width": left + width}
        line["crop"] = [left, left + width, top, top + height]
    if record.is_video:
        start, end = piece["start"], piece["start"] + piece["frames"]
        line |= {"num_frames": end, "fps": piece["fps"], "cut": [start, end]}
    return line


def _count(record: Record, piece: Mapping[str, Any], counts: Counter[str]) -> None:
    """What is worth knowing of what is kept."""
    counts["cropped, for text at an edge"] += piece["cropped"]
    whole = record.is_video and piece["frames"] < record.frames and record.exact
    counts["pieces between cuts, with the captions of the whole"] += whole


def _charts(
    values: Mapping[str, Sequence[NDArray[np.float32]]],
    kept: NDArray[np.bool_],
    rules: Sequence[_Rule],
) -> list[page.Chart]:
    """A chart of every score that was asked for, and that some piece has."""
    found = []
    for rule in rules:
        every = np.concatenate(values[rule.score])
        there = np.flatnonzero(~np.isnan(every))
        if len(there):
            shown = every[there], kept[there], there
            found.append(page.Chart(rule.score, rule.least, rule.most, *shown))
    return found
