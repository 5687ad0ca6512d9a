"""``skiparse data`` and ``skiparse cache``: what a data set consists of, and features made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from skiparse.command import Positional, Rest
from skiparse.models.data.limits import Limits

if TYPE_CHECKING:
    from skiparse.models.data.manifest import Manifest
    from skiparse.models.train.config import Stage


@dataclass(frozen=True, kw_only=True)
class Check:
    """Tell how many clips of a data set would be used, and why others would not.

    Args:
        source: a folder of clips, or annotations, or a data.txt.
        config: also by the rule of a stage of it, as of ``skiparse train``; default: none.
        stage: of --config; default: its last.
        out: what is dropped, by name.
        limits: the largest files to decode.
    """

    extra: ClassVar[str] = "train"
    source: Annotated[str, Positional("SOURCE")]
    config: Annotated[str | None, "CONFIG"] = None
    stage: Annotated[str | None, "STAGE"] = None
    out: Annotated[str, "FILE"] = "data_check.json"
    limits: Limits = field(default_factory=Limits)

    def run(self) -> None:
        """Scan, print, and write what is dropped."""
        from skiparse.models.data.atomic import check_writable
        from skiparse.models.data.buckets import assign, without_minority
        from skiparse.models.data.manifest import Manifest

        stage = self._stage()
        check_writable(self.out)
        manifest = Manifest.open(self.source, limits=self.limits)
        buckets = None
        if stage is not None:
            found = assign(manifest, stage.rule, 0)
            buckets = without_minority(found, stage.global_batch, stage.rule)
        report = manifest.report(buckets)
        for reason, names in report.examples.items():
            print(f"{report.dropped[reason]} {reason}:")
            print(*(f"  {name}" for name in names[:3]), sep="\n")
        _describe(manifest)
        if report.more["estimated"]:
            count = report.more["estimated"]
            print(f"{count} are large, and their frames are estimates until read")
        if buckets is not None:
            for shape, count in zip(buckets.shapes, buckets.counts, strict=True):
                print(f"{count} of {'x'.join(map(str, shape))}")
        report.write(self.out)
        print(report.line)
        print(f"what is dropped, by name: {self.out}")

    def _stage(self) -> Stage | None:
        """Whose rule is asked about, if that of any."""
        from skiparse.models.train.config import Stage, stages_of

        if self.config is None:
            if self.stage is not None:
                raise ValueError("--stage is of a --config; give that too")
            return None
        stages = stages_of(self.config)
        name = self.stage or list(stages)[-1]
        if name not in stages:
            raise ValueError(f"{name} is no stage; take one of {', '.join(stages)}")
        stage = stages[name]
        if not isinstance(stage, Stage):
            raise ValueError(f"{self.config} is of no denoiser: its stages have no rule to check")
        return stage


def _describe(manifest: Manifest) -> None:
    """Print how many clips there are, and between which sizes they lie."""
    videos = manifest.is_video > 0
    print(f"{videos.sum()} videos and {(~videos).sum()} images", end="")
    for what, values in (
        ("high", manifest.height),
        ("wide", manifest.width),
        ("frames", manifest.frames[videos]),
        ("frames a second", manifest.fps[videos].round(3)),
    ):
        if len(values):
            print(f", {values.min():g} to {values.max():g} {what}", end="")
    print()


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make annotations of a public data set as it lies on disk: shards, or a list and its files.

    The same command again goes on, and looks at nothing that has not changed.

    Args:
        kind: webdataset (shards of img2dataset and video2dataset), or whose list it is: recap,
            coyo, laion, panda.
        source: a shard or a folder of them; of the others a list (.parquet, .csv, .jsonl) or a
            folder of them.
        out: a folder; its data.txt is a SOURCE.
        files: where the files of a list are, a folder of shards or of files; default: none, as for
            webdataset.
        name: how a list names its files, such as {videoID}.mp4, or their keys in shards; default:
            they are found in shards by their url.
        columns: what a list, or the metadata of shards, calls otherwise: captions (several times),
            url, width, height, hash, times; ROLE= to go without; default: as on the data set's
            card.
        check: files opens every file for its size and frames; listed believes the metadata of
            shards.
        duplicates: listed leaves out what has the same hash by list or metadata, content what has
            the same bytes, keep nothing.
        min_side: of the shorter side, at least.
        skip_damaged: leave out shards that are cut off, and count them.
        workers: processes that look at files.
        limits: the largest files to decode.
    """

    extra: ClassVar[str] = "train"
    kind: Annotated[str, Positional("KIND")]
    source: Annotated[str, Positional("IN")]
    out: Annotated[str, Positional("OUT")]
    files: Annotated[str | None, "FOLDER"] = None
    name: Annotated[str | None, "TEMPLATE"] = None
    columns: Annotated[tuple[str, ...] | None, "ROLE=COLUMN,..."] = None
    check: Literal["files", "listed"] = "files"
    duplicates: Literal["listed", "content", "keep"] = "listed"
    min_side: Annotated[int, "PIXELS"] = 1
    skip_damaged: bool = False
    workers: Annotated[int, "PROCESSES"] = 0
    limits: Limits = field(default_factory=Limits)

    def run(self) -> None:
        """Import, and print what is dropped, a line per reason."""
        from skiparse.models.data import importing

        report = importing.bring(
            self.kind,
            self.source,
            self.out,
            files=self.files,
            name=self.name,
            columns=self.columns or (),
            check=self.check,
            duplicates=self.duplicates,
            min_side=self.min_side,
            skip_damaged=self.skip_damaged,
            workers=self.workers,
            limits=self.limits,
        )
        for reason, names in report.examples.items():
            print(f"{report.dropped[reason]} {reason}, the first {names[0]}")
        files = report.more.get("files", {"dropped": {}})  # of a list, which are no rows
        for reason, count in files["dropped"].items():
            print(f"of the files {count} {reason}, the first {files['examples'][reason][0]}")
        for what, count in report.more.items():
            if isinstance(count, int) and count:
                print(f"{count} {what}")
        print(report.line)
        print(f"clips: {Path(self.out) / importing.SOURCE}")


@dataclass(frozen=True, kw_only=True)
class Build:
    """Encode what a stage of a config trains on: latents and text embeddings, computed once.

    The same command again continues it.

    Args:
        config: as of ``skiparse train``.
        stage: whose source and rule to take.
        out: the folder of the cache.
        settings: of the config, as behind ``skiparse train CONFIG``.
        store: the type that is kept: float32, bfloat16 or float16.
        workers: processes that read.
    """

    extra: ClassVar[str] = "train"
    config: Annotated[str, Positional("CONFIG")]
    stage: Annotated[str, Positional("STAGE")]
    out: Annotated[str, Positional("OUT")]
    settings: Annotated[tuple[str, ...], Rest("--SETTING VALUE")] = ()
    store: Annotated[str, "DTYPE"] = "float32"
    workers: Annotated[int, "PROCESSES"] = 0

    def run(self) -> None:
        """Encode, and print the folder."""
        from skiparse.models import devices
        from skiparse.models.data import cache
        from skiparse.models.data.manifest import Manifest
        from skiparse.models.train.config import load
        from skiparse.models.train.recipe import Recipe, recipe_of

        config = load(self.config, self.settings)
        recipe = recipe_of(config.recipe)
        if not isinstance(recipe, Recipe):
            raise ValueError(f"{self.config} is of no denoiser; a cache is of what one learns from")
        if self.stage not in config.stages:
            raise ValueError(f"{self.stage} is no stage; take one of {', '.join(config.stages)}")
        stage = config.stages[self.stage]
        source = stage.source or config.source
        if source is None:
            raise ValueError("a cache needs a source; give --source")
        encoders = recipe.coder(config, devices.chosen(config.device, setting="--device "))
        out = Path(self.out)
        manifest = Manifest.open(source, index=out / "manifest", limits=config.limits)
        cache.build(
            out,
            manifest,
            stage.rule,
            encoders,
            seed=config.seed,
            dtype=self.store,
            limits=config.limits,
            workers=self.workers,
        )
        print(out)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare every checksum of a cache.

    Args:
        folder: of the cache.
        repair: drop what is damaged; ``skiparse cache build`` makes that again.
        full: compare all of each clip, not its size, time and ends.
    """

    extra: ClassVar[str] = "train"
    folder: Annotated[str, Positional("FOLDER")]
    repair: bool = False
    full: bool = False

    def run(self) -> None:
        """Compare, and print what is damaged."""
        from skiparse.models.data import cache

        found = cache.verify(self.folder, repair=self.repair, full=self.full)
        for damage in found:
            print(f"{damage.file}: {damage.reason}; lost: {', '.join(damage.keys) or 'unknown'}")
        if found and not self.repair:
            raise ValueError(f"{self.folder} is damaged; --repair, and build it again")
        print(f"{self.folder}: {len(found)} damaged files {'dropped' if found else ''}".rstrip())
