"""Which sizes of a video a model takes, and the nearest that it does."""

from __future__ import annotations


def check(height: int, width: int, frames: int, *, rows: int, columns: int, time: int) -> None:
    """Find out whether a video makes whole tokens.

    Args:
        height, width, frames: of the video, in pixels and frames.
        rows, columns: pixels of a token.
        time: frames of a latent, but for the first, which is of one.

    Raises:
        ValueError: if it does not, with the nearest sizes that do.
    """
    wrong = []
    for name, size, step in (("height", height, rows), ("width", width, columns)):
        if size < step or size % step:
            near = _nearest(size, step, step)
            wrong.append(f"{name}={size} must be a multiple of {step}: {near}")
    if frames < 1 or (frames - 1) % time:
        wrong.append(f"num_frames={frames} must be {time}n + 1: {_nearest(frames, time, 1)}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _nearest(value: int, step: int, least: int) -> str:
    """The nearest of ``least + n * step`` at or around ``value``, for an error message."""
    below = least + max(0, value - least) // step * step
    return f"take {below}" if value < least else f"take {below} or {below + step}"
