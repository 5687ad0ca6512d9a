"""``skiparse data`` and ``skiparse cache``: what a data set consists of, and features made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

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
