"""What WF-VAE costs: time, arithmetic and memory, whole and in pieces, beside other autoencoders.

On a GPU, the released size codes 121 frames of 576 x 1024 in chunks. On a CPU, a small one codes 17
frames of 128 x 128, in turns with AutoencoderKLWan and AutoencoderKLCogVideoX of diffusers, built
with about as many parameters and latent channels. All weights are random: nothing is said about
pictures here. The others make a latent of 4 frames where WF-VAE makes one of 8; the video is the
same. They always work in chunks of their own.

In chunks the result is put together again; streamed, each piece is let go of, as by a writer of
videos. Nothing is timed before chunks have given what the whole gives, in fp64 on a small video.
Arithmetic is counted on the operators that run, products and sums apart, so a share of a device's
peak can be read off. Memory is beyond input and output; on a CPU each figure is from a process of
its own.
"""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from skiparse.bench import rows
from skiparse.bench.timing import peak_extra_bytes, time_of
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stream import Stream

DIRECTIONS = ("encode", "decode")
CHUNK = 1  # latents
WARM = 33  # frames coded first: libraries take theirs then, for every kind of chunk
M_MMAP_THRESHOLD = -3  # bytes from which malloc asks the system; source: malloc.h
EXACT = 1e-12  # fp64, relative to the largest value
RELEASED = (121, 576, 1024)
# TFLOP of the released model for such a video. Source: its layers' products per pixel and frame.
PUBLISHED = {"encode": 64, "decode": 387}

SMALL = {
    "base_channels": 32,
    "latent_channels": 16,
    "encoder_energy_channels": 32,
    "decoder_energy_channels": 32,
}
WAN = {"base_dim": 26}
COGVIDEOX = {"block_out_channels": (26, 52, 52, 104), "norm_num_groups": 2}


@dataclass(frozen=True)
class Size:
    """A model, the video it is timed with, and those its memory is measured with."""

    config: dict[str, Any] = field(hash=False)
    video: tuple[int, int, int]  # frames, height, width
    contenders: tuple[str, ...]
    memory: tuple[int, int]  # height, width
    frames: tuple[int, ...] = (17, 33, 65, 121)

    @property
    def ways(self) -> tuple[str, ...]:
        """Those of WF-VAE itself."""
        return tuple(name for name in self.contenders if name.startswith("wfvae"))


SIZES = {
    "cuda": Size(WFVAE.presets["v1.5-M"], RELEASED, ("wfvae.chunked",), (576, 1024)),
    "cpu": Size(
        SMALL,
        (17, 128, 128),
        ("wfvae.whole", "wfvae.chunked", "wfvae.streamed", "wan", "cogvideox"),
        (64, 64),
    ),
}


Key = tuple[str, str, tuple[int, int, int]]  # direction, contender, video


@dataclass(frozen=True)
class Figure:
    """One direction of one contender."""

    direction: str
    name: str
    video: tuple[int, int, int]
    extra_bytes: int | None  # at the peak, beyond input and output
    seconds: tuple[float, ...] = ()  # of each round; none where only memory was measured
    parameters: int = 0
    flop: int = 0

    @property
    def case(self) -> str:
        what = "time" if self.seconds else "memory"
        return f"vae.{self.direction}.{what}.{'x'.join(map(str, self.video))}"


def run(
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    size: Size | None = None,
    results: Path | None = None,
) -> list[rows.Row]:
    """Measure, print the tables, and append the rows to ``results``.

    Args:
        dtype: of weights and video.
        rounds: interleaved repetitions; medians are over these.
        size: None takes that of the device in ``SIZES``.
        results: a JSON-lines file, or None to keep nothing.

    Returns:
        One row for each contender and direction, and one for each figure of memory.

    Raises:
        AssertionError: if chunks do not give what the whole gives. Nothing is timed then.
        ValueError: if rounds is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    size = size or SIZES[torch.device(device).type]
    check(build("wfvae.chunked", size, device, dtype))
    timings = _timed(size, device, dtype, rounds)
    todo: list[Key] = [
        (direction, way, (frames, *size.memory))
        for direction in DIRECTIONS
        for way in size.ways
        for frames in size.frames
    ]
    peaks = _peaks(size, [*timings, *todo], device, dtype)
    timed = [
        Figure(*key, peaks[key], seconds, *count(size, *key)) for key, seconds in timings.items()
    ]
    kept = [Figure(*key, peaks[key]) for key in todo]
    print(time_table(size, dtype, timed), flush=True)
    print(memory_table(size, kept), flush=True)
    found = [row(figure, timed, device, dtype) for figure in timed + kept]
    if results is not None:
        rows.append(results, found)
    return found


def build(name: str, size: Size, device: str, dtype: torch.dtype) -> nn.Module:
    """A contender's model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "wan":
            model = AutoencoderKLWan(z_dim=size.config["latent_channels"], **WAN)
        elif name == "cogvideox":
            model = AutoencoderKLCogVideoX(
                latent_channels=size.config["latent_channels"], **COGVIDEOX
            )
        else:
            model = WFVAE(**size.config)
    # Not model.to, which warns of every change of dtype.
    return nn.Module.to(model.eval().requires_grad_(False), device, dtype)


def inputs(name: str, size: Size, video: tuple[int, int, int]) -> dict[str, Tensor]:
    """Seeded random video and latents, fp32 on the CPU, by direction."""
    generator = torch.Generator().manual_seed(0)
    frames, height, width = video
    factor = 8 if name.startswith("wfvae") else 4
    latent = ((frames - 1) // factor + 1, height // 8, width // 8)
    return {
        "encode": torch.rand(1, 3, *video, generator=generator) * 2 - 1,
        "decode": torch.randn(1, size.config["latent_channels"], *latent, generator=generator),
    }


def call(name: str, model: Any, direction: str) -> Callable[[Tensor], Tensor]:
    """Video to the mean of its latents, or latents to video, as a contender does it.

    What is streamed comes to nothing.
    """
    chunks: dict[str, int] = {}
    if name == "wfvae.chunked":
        chunks = (
            {"chunk_frames": CHUNK * model.temporal_factor}
            if direction == "encode"
            else {"chunk_latents": CHUNK}
        )

    @torch.no_grad()
    def code(x: Tensor) -> Tensor:
        if name == "wfvae.streamed":
            piece = CHUNK * (model.temporal_factor if direction == "encode" else 1)
            stream = model.encode_stream if direction == "encode" else model.decode_stream
            for _ in stream(x.split(piece, 2)):
                pass
            return x.new_empty(0)
        if direction == "encode":
            return model.encode(x, **chunks).latent_dist.mean
        return model.decode(x, **chunks).sample

    return code


def check(model: Any) -> None:
    """In fp64, three latents of 32 x 32 pixels in chunks and whole.

    Raises:
        AssertionError: if they are further apart than rounding.
    """
    exact = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 17, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    x = video.to(exact.device)
    for direction in DIRECTIONS:
        whole, chunked = (
            call(name, exact, direction)(x) for name in ("wfvae.whole", "wfvae.chunked")
        )
        error = float((whole - chunked).abs().max() / whole.abs().max())
        assert error <= EXACT, f"{direction} in chunks is off by {error:.1e}, allowed {EXACT:.0e}"
        x = whole


def count(size: Size, direction: str, name: str, video: tuple[int, int, int]) -> tuple[int, int]:
    """Parameters of a contender, and its floating-point operations, counted without doing them."""
    model: Any = build(name, size, "meta", torch.float32)
    x = inputs(name, size, video)[direction].to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if name.startswith("wfvae"):  # past the checks of the input, which want its values
            (model.encoder if direction == "encode" else model.decoder)(x, Stream())
        else:
            call(name, model, direction)(x)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


# What is measured.


def _timed(
    size: Size, device: str, dtype: torch.dtype, rounds: int
) -> dict[Key, tuple[float, ...]]:
    """Seconds of the contenders in turns, after each has coded the video once."""
    seconds: dict[Key, list[float]] = {}
    models = {name: build(name, size, device, dtype) for name in size.contenders}
    for direction in DIRECTIONS:
        works = {
            name: _work(
                call(name, model, direction),
                inputs(name, size, size.video)[direction].to(device, dtype),
            )
            for name, model in models.items()
        }
        for work in works.values():
            work()
        for _ in tqdm(range(rounds), desc=direction, unit="round", disable=None, leave=False):
            for name, work in works.items():
                took = time_of(work, 1, device)
                seconds.setdefault((direction, name, size.video), []).append(took)
    return {key: tuple(took) for key, took in seconds.items()}


def _work(code: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: code(x)


def _peaks(
    size: Size, todo: Iterable[Key], device: str, dtype: torch.dtype
) -> dict[Key, int | None]:
    """Memory of each; on a CPU in a process each, for what one leaves to the allocator would be
    missing in the next."""
    bar = tqdm(list(todo), desc="memory", disable=None, leave=False)
    if torch.device(device).type == "cuda":
        return {key: _peak(size, key, device, dtype) for key in bar}
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
        initializer=_plain_process,
        initargs=(threads,),
    ) as fresh:
        return {key: fresh.submit(_peak, size, key, device, dtype).result() for key in bar}


def _plain_process(threads: int) -> None:
    """As many threads as the parent, and an allocator that gives tensors back at once."""
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**16)


def _peak(size: Size, key: Key, device: str, dtype: torch.dtype) -> int | None:
    """Memory at its highest beyond what was there before and what comes out."""
    direction, name, video = key
    code = call(name, build(name, size, device, dtype), direction)
    small = (min(video[0], WARM), *video[1:])
    code(inputs(name, size, small)[direction].to(device, dtype))
    x = inputs(name, size, video)[direction].to(device, dtype)
    made: list[int] = []
    peak = peak_extra_bytes(lambda: made.append(code(x).nbytes), device)
    return None if peak is None else max(0, peak - made[0])


# What is shown.


def time_table(size: Size, dtype: torch.dtype, figures: Sequence[Figure]) -> str:
    """For a terminal: time of each contender, its ratio to the whole, arithmetic, memory."""
    header = f"{'':24}{'params':>8}{'ms':>11}{'spread':>20}{'this/whole':>12}"
    lines = [
        "",
        f"one video of {'x'.join(map(str, size.video))}, {str(dtype).removeprefix('torch.')}",
        header + f"{'TFLOP':>9}{'TFLOP/s':>9}{'extra MiB':>11}",
    ]
    for figure in figures:
        median = statistics.median(figure.seconds)
        low, high = min(figure.seconds) * 1e3, max(figure.seconds) * 1e3
        gain = _speedup(figure, figures)
        lines.append(
            f"{figure.direction:8}{figure.name:16}{figure.parameters / 1e6:7.1f}M"
            f"{median * 1e3:11.1f}{f'{low:.1f}-{high:.1f}':>20}"
            f"{'' if gain is None else f'{1 / gain:.2f}x':>12}{figure.flop / 1e12:9.3f}"
            f"{figure.flop / median / 1e12:9.3f}{_mib(figure.extra_bytes):>11}"
        )
    if size.video == RELEASED:
        lines.append(
            "published counts: " + ", ".join(f"{n} {x} TFLOP" for n, x in PUBLISHED.items())
        )
    return "\n".join(lines)


def memory_table(size: Size, figures: Sequence[Figure]) -> str:
    """For a terminal: memory of each way, a column for each number of frames."""
    lines = [
        "",
        f"MiB beyond input and output, frames of {'x'.join(map(str, size.memory))}",
        f"{'':24}" + "".join(f"{frames:>9}" for frames in size.frames),
    ]
    for direction in DIRECTIONS:
        for way in size.ways:
            found = [f for f in figures if (f.direction, f.name) == (direction, way)]
            lines.append(
                f"{direction:8}{way:16}" + "".join(f"{_mib(f.extra_bytes):>9}" for f in found)
            )
    return "\n".join(lines)


def row(figure: Figure, figures: Sequence[Figure], device: str, dtype: torch.dtype) -> rows.Row:
    """One line of the results, as in ``results.jsonl``; speed-up is over the whole video."""
    figures_of: dict[str, Any] = {"peak_extra_mib": rows.mib(figure.extra_bytes)}
    if figure.seconds:
        gain, median = _speedup(figure, figures), statistics.median(figure.seconds)
        figures_of |= {
            "parameters": figure.parameters,
            "tflop": round(figure.flop / 1e12, 4),
            "published_tflop": PUBLISHED[figure.direction] if figure.video == RELEASED else None,
            "tflops": round(figure.flop / median / 1e12, 4),
            "speedup": None if gain is None else round(gain, 4),
        }
    return rows.row(
        figure.case,
        figure.name,
        device=device,
        dtype=dtype,
        seconds=figure.seconds,
        **figures_of,
    )


def _speedup(figure: Figure, figures: Sequence[Figure]) -> float | None:
    """Over the unchunked model, where that was timed: the median of the rounds' ratios."""
    for other in figures:
        if (other.direction, other.name) == (figure.direction, "wfvae.whole"):
            pairs = zip(other.seconds, figure.seconds, strict=True)
            return statistics.median(whole / this for whole, this in pairs)
    return None


def _mib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.1f}"
