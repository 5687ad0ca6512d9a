"""From a clip to a generated video, by the library's own tools and no weights from outside.

1. Four scenes of the real clip, each with a caption, are written as a folder of clips.
2. The autoencoder is the one of :mod:`skiparse.bench.experiments.reconstruct`, trained on the
   same clip.
3. The text encoders are a T5 and a CLIP of the real classes with random weights, tiny, that read
   characters: enough to tell four captions apart.
4. The features of all scenes are cached, for each stage of the chain.
5. The chain ``mini`` trains from the caches alone: a dense model of pictures, converted to SUV,
   then videos, then longer ones, with averaged weights and adaptive clipping.
6. The run is exported, loaded as anybody would, and makes a video from each caption.

It learns one clip of five seconds by heart. That shows that all parts work together; it says
nothing about how well the model would generalise. Every part finds what an interrupted demo left
and goes on from there.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import os
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from skiparse.bench.clip import FPS
from skiparse.bench.demo import report
from skiparse.bench.experiments import outcome
from skiparse.models import shards
from skiparse.models.data import cache
from skiparse.models.data.manifest import Manifest
from skiparse.models.data.video import read_video
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.suv.encoders import Encoders
from skiparse.models.suv.recipe import SUVConfig, SUVStage
from skiparse.models.train import config as train_config
from skiparse.models.train.core import train
from skiparse.models.train.export import export
from skiparse.models.wfvae import evaluate
from skiparse.models.writer import write_video

SCENES = (
    (0.0, "a rabbit crawls out of its burrow"),
    (1.3, "a rabbit gets up and stands on the grass"),
    (2.6, "a rabbit stretches its arms and yawns"),
    (4.2, "a rabbit lets its arms sink and looks down"),
)
FRAMES, SIDE = 21, 128
TEXT_WIDTH, POOLED_WIDTH = 64, 48
SAMPLE_STEPS, GUIDANCE = 25, 3.0


def run(
    out: str | os.PathLike[str], clip: str | os.PathLike[str], *, steps: float = 1.0
) -> dict[str, Any]:
    """Do all of it in the folder ``out``, in which ``vae/`` holds the autoencoder.

    Args:
        out: gets ``clips/``, ``text/``, ``cache/``, ``run/``, ``model/`` and the videos,
            ``source-0.mp4`` beside ``generated-0.mp4`` and so on.
        clip: of five seconds or more.
        steps: those of the chain times this.

    Returns:
        Every number, ready for JSON.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM; called again, it goes on.
    """
    folder = Path(out)
    make_clips(folder / "clips", Path(clip))
    make_text(folder / "text")
    config = config_of(folder, steps)
    make_caches(folder, config)
    total = sum(stage.steps for stage in config.stages.values())
    if train(config).name != f"step-{total:08d}":
        raise KeyboardInterrupt  # which the trainer, having saved, keeps to itself
    model = folder / "model"
    if not is_of(model, folder / "run"):
        shutil.rmtree(model, ignore_errors=True)
        export(Path(config.out), model, vae=folder / "vae", text=folder / "text")
    made = make_videos(folder, model, config)
    return {"method": __doc__, "log": read_log(Path(config.out)), "videos": made}


def make_clips(folder: Path, clip: Path) -> None:
    """The scenes, each a file with its caption beside it."""
    if folder.is_dir():
        return
    with shards.new_folder(folder) as aside:
        for i, (start, caption) in enumerate(SCENES):
            frames = read_video(
                clip, frames=FRAMES, fps=FPS, size=(SIDE, SIDE), start=start, threads=1
            )
            write_video(aside / f"{i}.mp4", frames, fps=FPS, crf=10)
            (aside / f"{i}.txt").write_text(caption + "\n", encoding="utf-8")


def make_text(folder: Path) -> None:
    """Text encoders with random weights, always the same, as a pipeline keeps them."""
    if folder.is_dir():
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=128,
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                dropout_rate=0.0,
            )
        )
        clip = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=128,
                hidden_size=TEXT_WIDTH,
                intermediate_size=128,
                projection_dim=POOLED_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=1,
                eos_token_id=3,
                pad_token_id=0,
            )
        )
    with shards.new_folder(folder) as aside:
        _characters(None, "</s>", 512).save_pretrained(aside / "tokenizer")
        t5.save_pretrained(aside / "text_encoder")
        _characters("<start>", "<end>", 77).save_pretrained(aside / "tokenizer_2")
        clip.save_pretrained(aside / "text_encoder_2")


def _characters(start: str | None, end: str, length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character."""
    special = [token for token in ("<pad>", start, "<unk>", end) if token]
    vocabulary = {token: i for i, token in enumerate([*special, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(token for token in (start, "$A", end) if token),
        special_tokens=[(token, vocabulary[token]) for token in special],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=start,
        eos_token=end,
        model_max_length=length,
    )


def config_of(folder: Path, steps: float) -> SUVConfig:
    """The chain ``mini``, to be trained from caches."""
    channels = json.loads((folder / "vae" / "config.json").read_text("utf-8"))["latent_channels"]
    sizes = {"in_channels": channels, "out_channels": channels}
    arguments = [f"--model.{name}={value}" for name, value in sizes.items()]
    arguments += [f"--out={folder / 'run'}", f"--source={folder / 'clips'}"]
    arguments += [f"--vae={folder / 'vae'}", f"--text={folder / 'text'}"]
    chain = train_config.load("mini", arguments)

    def smaller(name: str, stage: SUVStage) -> SUVStage:
        return dataclasses.replace(
            stage,
            steps=max(1, round(stage.steps * steps)),
            then={max(1, round(at * steps)): rate for at, rate in stage.then.items()},
            cache=str(folder / "cache" / name),
        )

    stages = {name: smaller(name, stage) for name, stage in chain.stages.items()}
    return dataclasses.replace(chain, stages=stages)


def make_caches(folder: Path, config: SUVConfig) -> None:
    """The features of all scenes, as each stage cuts them."""
    encoders = Encoders.from_pretrained(folder / "vae", folder / "text", "cpu")
    manifest = Manifest.open(folder / "clips", index=folder / "cache" / "index")
    for stage in config.stages.values():
        assert stage.cache is not None
        cache.build(Path(stage.cache), manifest, stage.rule, encoders, seed=config.seed)


def is_of(model: Path, run: Path) -> bool:
    """Whether ``model`` was exported from the last checkpoint of ``run``."""
    made = model / "model_index.json"
    last = max((run / "checkpoints").glob("step-*"))
    return made.is_file() and made.stat().st_mtime > last.stat().st_mtime


def make_videos(folder: Path, model: Path, config: SUVConfig) -> list[dict[str, Any]]:
    """A video from each caption, its source beside it, and how far apart they are."""
    pipeline = SUVPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    *_, stage = config.stages.values()
    made: list[dict[str, Any]] = []
    videos, sources = [], []
    for i, (_, caption) in enumerate(tqdm(SCENES, "sampling", unit="video", disable=None)):
        video = pipeline(
            caption,
            negative_prompt="",
            height=SIDE,
            width=SIDE,
            num_frames=stage.rule.frames,
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=GUIDANCE,
            template="{prompt}",
            generator=torch.Generator().manual_seed(i),
            output_type="uint8",
        ).frames[0]
        source = read_video(
            folder / "clips" / f"{i}.mp4",
            frames=stage.rule.frames,
            fps=FPS,
            size=(SIDE, SIDE),
            threads=1,
        )
        paths = [folder / f"{name}-{i}.mp4" for name in ("source", "generated")]
        for path, frames in zip(paths, (source, video), strict=True):
            write_video(path, frames, fps=FPS, crf=16)
        made.append({"caption": caption, "files": [path.name for path in paths]})
        videos.append(video)
        sources.append(source)
    for one, video in zip(made, videos, strict=True):
        one["psnr"] = [likeness(video, source) for source in sources]
    return made


def likeness(video: Tensor, other: Tensor) -> float:
    """PSNR in dB of two videos, uint8 ``[T, H, W, 3]``: the mean over frames."""
    return float(evaluate.psnr(*(x.movedim(-1, 1) / 255 for x in (video, other))).mean())


def read_log(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's log."""
    with (out / "log.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw(log: Sequence[dict[str, Any]]) -> bytes:
    """Loss, and the norm of the gradient under its threshold, over all stages; a PNG."""
    figure = Figure(figsize=(12, 5.6), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in log]
    losses = [row["loss"] for row in log]
    top.plot(steps, losses, color="#3b6ea5", lw=0.5, alpha=0.5)
    top.plot(steps, _smooth(losses), color="#3b6ea5", lw=1.8)
    top.set_ylabel("loss")
    norms = [row["norm"] for row in log]
    bottom.plot(steps, norms, color="#d1803a", lw=0.8, label="norm of the gradient")
    bottom.plot(steps, [row["threshold"] for row in log], color="#555", lw=1, label="threshold")
    clipped = [row for row in log if row["action"] != "step"]
    bottom.plot(
        [row["step"] for row in clipped],
        [row["norm"] for row in clipped],
        "x",
        color="#b03030",
        ms=4,
        label=f"clipped or skipped: {len(clipped)} of {len(log)}",
    )
    bottom.set_xlabel("steps")
    bottom.legend(frameon=False, fontsize=8)
    for plot in (top, bottom):
        plot.set_yscale("log")
        plot.grid(color="#ddd", lw=0.6)
        plot.spines[["top", "right"]].set_visible(False)
    stage = None
    for row in log:
        if row["stage"] != stage:
            stage = row["stage"]
            for plot in (top, bottom):
                plot.axvline(row["step"], color="#999", lw=0.8, ls="--")
            top.text(row["step"], max(losses), f" {stage}", fontsize=9, va="top")
    return outcome.png(figure)


def _smooth(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """A running average without a bias at its start."""
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        found.append(total / weight)
    return found


def section(out: str | os.PathLike[str], found: dict[str, Any]) -> str:
    """The part of the report that shows it, as HTML that loads nothing."""
    folder, log = Path(out), found["log"]
    stages = {row["stage"]: row for row in log}  # the last row of each
    rows = "".join(
        f"<tr><th>{html.escape(one['caption'])}</th>"
        + "".join(
            f"<td>{'<strong>' if i == j else ''}{value:.1f}{'</strong>' if i == j else ''}</td>"
            for j, value in enumerate(one["psnr"])
        )
        + "</tr>"
        for i, one in enumerate(found["videos"])
    )
    videos = "".join(_pair(folder, **one) for one in found["videos"])
    heads = "".join(f"<th>source {i + 1}</th>" for i in range(len(found["videos"])))
    seconds = sum(row["seconds"] for row in log)
    alt = "Loss, gradient norm and threshold over the steps"
    return f"""<section>
<h2>From the clip to generated video</h2>
<p>A chain of {len(stages)} stages ({", ".join(map(html.escape, stages))}) trains a tiny SUV in
{len(log)} steps, {seconds:.0f} seconds of training in all, from cached features. It <strong>learns
four scenes of one clip by heart</strong>: that shows that all parts work together, and nothing
about how well such a model would generalise. The sharpness is bounded by that of the tiny
autoencoder above.</p>
<div class="videos">{videos}</div>
<div class="wide"><table><thead><tr><th>PSNR, dB, of the video from</th>{heads}</tr></thead>
<tbody>{rows}</tbody></table></div>
<figure class="plot">{report.image(draw(log), "png", alt)}</figure>
</section>
"""


def _pair(folder: Path, caption: str, files: Sequence[str], **rest: object) -> str:
    """Source and generated video side by side."""
    shown = "".join(
        f'<video controls loop muted autoplay playsinline aria-label="{name}" '
        f'src="data:video/mp4;base64,{_base64((folder / name).read_bytes())}"></video>'
        for name in files
    )
    legend = f"{html.escape(caption)}: source, generated"
    return f"<figure>{shown}<figcaption>{legend}</figcaption></figure>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
