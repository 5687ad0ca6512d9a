"""What a feature cache saves: time and memory of training steps with encoders, and from a cache.

A small SUV is trained on images, or on short videos, once with all encoders beside it and once from
a cache of the same clips, which :mod:`skiparse.models.data.cache` has built from files. All weights
are random and the clips are noise: nothing is said about quality here. Both kinds of step take
turns, and so does a third one whose parts are timed apart. From these parts follows what the cache
should gain, ``(read + text + vae - load) / (read + text + vae + dit)``; beside it stands what it
does gain. Nothing is timed before both have given the same batch, bit for bit.

How large the gain is depends on how dear the encoders are beside the denoiser, which is another
ratio here than in a large model: what carries over is that the formula holds.

Source: Open-Sora Plan v1.5 report, the table of its future work, printed below ours.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from skiparse.bench import rows
from skiparse.bench.timing import peak_extra_bytes
from skiparse.models import flow
from skiparse.models.data import cache
from skiparse.models.data.buckets import Rule, assign
from skiparse.models.data.cache import Cache
from skiparse.models.data.dataset import Clips
from skiparse.models.data.draws import Place
from skiparse.models.data.features import Batch, collate
from skiparse.models.data.manifest import Manifest
from skiparse.models.suv.encoders import Encoders
from skiparse.models.suv.model import SUV
from skiparse.models.text import TextEncoders
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.writer import write_video

PARTS = ("read", "text", "vae", "load", "dit")
AGREE = 0.03  # of a step, within which the predicted and the measured gain should be
WAYS = ("encoders", "cache")
MEMORY_STEPS = 2

# Seconds of a step and gigabytes, with encoders and from a cache, on 8 A800; a model of about 2B.
PUBLISHED = (
    ("images, 64 a batch", 6.53, 4.10, 56, 40),
    ("images, 128 a batch", 12.78, 7.81, 74, 50),
    ("small videos, 8 a batch", 8.90, 7.78, 68, 51),
    ("large videos, 4 a batch", 17.0, 16.0, 71, 57),
)


@dataclass(frozen=True)
class Setting:
    """Clips, how many of them make a batch, and how large the models are."""

    name: str
    frames: int
    size: tuple[int, int]  # height and width
    batch: int
    clips: int = 8
    channels: int = 16  # of a latent
    width: int = 32  # of the autoencoder, at full size
    heads: int = 4  # of the denoiser, of 64 channels
    layers: tuple[int, ...] = (2, 4, 2)
    text_width: int = 256
    text_layers: int = 4


SETTINGS = (
    Setting("image", frames=1, size=(128, 128), batch=8),
    Setting("video", frames=17, size=(128, 128), batch=2),
)


@dataclass(frozen=True)
class Figures:
    """Seconds of each round, and memory, of one setting."""

    setting: Setting
    steps: dict[str, list[float]]  # by way
    parts: dict[str, list[float]]  # by part
    peak_bytes: dict[str, int | None]  # by way

    @property
    def predicted(self) -> float:
        """The share of a step that the cache should save, by the parts."""
        read, text, vae, load, dit = (statistics.median(self.parts[part]) for part in PARTS)
        return (read + text + vae - load) / (read + text + vae + dit)

    @property
    def measured(self) -> float:
        """The share that it saves: the median over the rounds."""
        pairs = zip(*(self.steps[way] for way in WAYS), strict=True)
        return statistics.median(1 - cached / full for full, cached in pairs)


def run(
    *,
    rounds: int = 5,
    settings: Sequence[Setting] = SETTINGS,
    results: Path | None = None,
) -> list[rows.Row]:
    """Measure on the CPU, print the tables, and append the rows to ``results``.

    Args:
        rounds: interleaved repetitions; medians are over these.
        settings: what is trained on.
        results: a JSON-lines file, or None to keep nothing.

    Returns:
        Two rows for each setting: with encoders, and from a cache.

    Raises:
        AssertionError: if the two give different batches. Nothing is timed then.
        ValueError: if rounds is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    found: list[rows.Row] = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(setting, Path(folder), rounds)
        print(table(figures), flush=True)
        new = [row(figures, way) for way in WAYS]
        if results is not None:
            rows.append(results, new)
        found += new
    print(published_table())
    return found


def measure(setting: Setting, folder: Path, rounds: int) -> Figures:
    """Make clips and their cache in ``folder``, check it, and time steps of each kind in turns."""
    write_clips(setting, folder / "clips")
    encoders = build_encoders(setting)
    rule, manifest = _data(setting, folder)
    cache.build(folder / "cache", manifest, rule, encoders)
    batches = {"encoders": online(setting, folder, encoders), "cache": cached(setting, folder)}
    check(batches)
    train = trainer(setting)
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in tqdm(range(-1, rounds), setting.name, unit="round", disable=None, leave=False):
        for way in WAYS:
            start = time.perf_counter()
            train(batches[way](number + 1))
            if number >= 0:  # the first round only warms up
                steps[way].append(time.perf_counter() - start)
        for part, seconds in timed_parts(setting, folder, encoders, train, number + 1).items():
            if number >= 0:
                parts[part].append(seconds)
    return Figures(setting, steps, parts, {way: _peak(setting, folder, way) for way in WAYS})


# What is trained on, and how.


def write_clips(setting: Setting, folder: Path) -> None:
    """Noise as PNG or mp4, with captions of half a hundred letters."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(setting.clips):
        shape = (setting.frames, *setting.size, 3)
        frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        if setting.frames == 1:
            Image.fromarray(frames[0].numpy()).save(folder / f"{number}.png")
        else:
            write_video(folder / f"{number}.mp4", frames)
        caption = f"clip {number}: a kite of many colours rises over the sea"
        (folder / f"{number}.txt").write_text(caption)


def build_encoders(setting: Setting) -> Encoders:
    """Random ones, the same each time; a token of text is a letter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=64,
                d_model=setting.text_width,
                d_ff=4 * setting.text_width,
                d_kv=64,
                num_heads=setting.text_width // 64,
                num_layers=setting.text_layers,
                feed_forward_proj="gated-gelu",
            )
        )
        clip = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=64,
                hidden_size=setting.text_width // 2,
                intermediate_size=2 * setting.text_width,
                projection_dim=setting.text_width // 2,
                num_hidden_layers=setting.text_layers,
                num_attention_heads=4,
                bos_token_id=1,
                eos_token_id=3,
                pad_token_id=0,
            )
        )
        vae = WFVAE(
            base_channels=setting.width,
            latent_channels=setting.channels,
            encoder_energy_channels=setting.width,
            decoder_energy_channels=setting.width,
        )
    letters = tokenizer()
    return Encoders(vae, TextEncoders(letters, t5, letters, clip))


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, with one in front and one behind."""
    special = ["<pad>", "<start>", "<unk>", "<end>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz ,:"])}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", unk_token="<unk>")


Step = Callable[[int], Batch]  # the batch of a step, by its number


def online(setting: Setting, folder: Path, encoders: Encoders) -> Step:
    """Batches that the encoders make in the step."""
    clips = _clips(setting, folder)
    return lambda step: _batch([encoders.features(clips[place]) for place in places(setting, step)])


def cached(setting: Setting, folder: Path) -> Step:
    """The same from the cache."""
    held = Cache(folder / "cache")
    return lambda step: _batch([held[place] for place in places(setting, step)])


def places(setting: Setting, step: int) -> list[Place]:
    """One clip after the other."""
    first = step * setting.batch
    rows = [(first + i) % setting.clips for i in range(setting.batch)]
    return [Place(step, i, row) for i, row in enumerate(rows)]


def check(batches: dict[str, Step]) -> None:
    """AssertionError unless both give the same batch."""
    one, other = (batches[way](0) for way in WAYS)
    pairs = {"latents": (one.latents, other.latents)}
    pairs |= {name: (x, other.captions[name]) for name, x in one.captions.items()}
    for name, pair in pairs.items():
        assert torch.equal(*pair), f"{name} from the cache are not those of the encoders"


def trainer(setting: Setting) -> Callable[[Batch], None]:
    """Forward, backward and AdamW of a denoiser with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = SUV(
            num_layers=setting.layers,
            sparsity=(1, *[2] * (len(setting.layers) - 2), 1),
            num_heads=setting.heads,
            head_dim=64,
            in_channels=setting.channels,
            out_channels=setting.channels,
            text_channels=setting.text_width,
            pooled_channels=setting.text_width // 2,
            timestep_channels=128,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(2)

    def train(batch: Batch) -> None:
        sigmas = flow.sample_sigmas(len(batch.latents), generator=generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        noisy = flow.add_noise(batch.latents, noise, sigmas)
        given = batch.captions
        times, text = flow.timesteps(sigmas), given["states"]
        found = model(noisy, times, text, given["pooled"], given["states_mask"])
        loss: Tensor = flow.loss(found, flow.velocity(batch.latents, noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return train


def _data(setting: Setting, folder: Path) -> tuple[Rule, Manifest]:
    rule = Rule(frames=setting.frames, size=setting.size, minority=0)
    return rule, Manifest.open(folder / "clips", index=folder / "manifest")


def _clips(setting: Setting, folder: Path) -> Clips:
    rule, manifest = _data(setting, folder)
    return Clips(manifest, assign(manifest, rule, 0), rule, windows="fixed")


def _batch(features: Sequence[Any]) -> Batch:
    return collate(features, seed=0, drop=0.1)


# What is measured.


def timed_parts(
    setting: Setting,
    folder: Path,
    encoders: Encoders,
    train: Callable[[Batch], None],
    step: int,
) -> dict[str, float]:
    """Seconds of each part of a step with encoders, and of loading the same from the cache."""
    clips, held = _clips(setting, folder), Cache(folder / "cache")
    found: dict[str, float] = {}
    with _timed(found, "read"):
        read = [clips[place] for place in places(setting, step)]
    with _timed(found, "vae"):
        for clip in read:
            encoders.posterior(clip)
    with _timed(found, "text"):
        for clip in read:
            for caption in clip.captions:
                encoders.embed(caption)
    with _timed(found, "load"):
        features = [held[place] for place in places(setting, step)]
    with _timed(found, "dit"):
        train(_batch(features))
    return found


@contextmanager
def _timed(found: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    found[part] = time.perf_counter() - start


def _peak(setting: Setting, folder: Path, way: str) -> int | None:
    """Memory of a training at its highest, with the models and all, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        threads = torch.get_num_threads()
        return fresh.submit(_peak_here, setting, folder, way, threads).result()


def _peak_here(setting: Setting, folder: Path, way: str, threads: int) -> int | None:
    torch.set_num_threads(threads)

    def work() -> None:
        made = cached(setting, folder) if way == "cache" else None
        made = made or online(setting, folder, build_encoders(setting))
        train = trainer(setting)
        for step in range(MEMORY_STEPS):
            train(made(step))

    return peak_extra_bytes(work, "cpu")


# What is shown.


def table(figures: Figures) -> str:
    """For a terminal: the parts, both kinds of step, and the gain in time and memory."""
    setting = figures.setting
    clip = "x".join(map(str, (setting.frames, *setting.size)))
    full, cached_ = (figures.peak_bytes[way] for way in WAYS)
    lines = ["", f"{setting.name}: {setting.batch} clips of {clip} a step, float32"]
    for part in PARTS:
        lines.append(f"  {part:10}{statistics.median(figures.parts[part]) * 1e3:10.1f} ms")
    for way in WAYS:
        seconds = figures.steps[way]
        spread = f"{min(seconds) * 1e3:.1f}-{max(seconds) * 1e3:.1f}"
        peak = figures.peak_bytes[way]
        lines.append(
            f"  {way:10}{statistics.median(seconds) * 1e3:10.1f} ms a step{spread:>18}"
            f"{'?' if peak is None else f'{peak / 2**20:.0f}':>8} MiB"
        )
    apart = abs(figures.predicted - figures.measured)
    lines.append(
        f"  time saved: predicted {figures.predicted:.1%}, measured {figures.measured:.1%}, apart "
        f"{100 * apart:.1f} points{'' if apart <= AGREE else f', more than {100 * AGREE:.0f}'}"
    )
    if full and cached_:
        lines.append(f"  memory saved: {1 - cached_ / full:.1%}")
    return "\n".join(lines)


def published_table() -> str:
    """The same of the report."""
    lines = ["", "published (8 A800): seconds a step, time saved, memory saved"]
    for name, full, cached_, before, after in PUBLISHED:
        lines.append(
            f"  {name:25}{full:7.2f} -> {cached_:5.2f}{1 - cached_ / full:8.1%}"
            f"{1 - after / before:8.1%}"
        )
    return "\n".join(lines)


def row(figures: Figures, way: str) -> rows.Row:
    """One line of the results, as in ``results.jsonl``; speed-up is over the encoders."""
    parts = {part: statistics.median(figures.parts[part]) for part in PARTS}
    return rows.row(
        f"cache.{figures.setting.name}",
        way,
        device="cpu",
        dtype=torch.float32,
        seconds=figures.steps[way],
        parts_ms={part: round(value * 1e3, 3) for part, value in parts.items()},
        predicted_gain=round(figures.predicted, 4),
        measured_gain=round(figures.measured, 4),
        peak_extra_mib=rows.mib(figures.peak_bytes[way]),
        speedup=round(1 / (1 - figures.measured), 4) if way == "cache" else 1.0,
    )
