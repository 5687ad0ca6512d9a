"""Which samples make up each batch of a run: a pure function of the seed, whoever asks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from skiparse.models.data.draws import Place, Use, numbers


class BucketBatchSampler(Sampler[list[Place]]):
    """Batches of one bucket each, for one rank of a run: a ``batch_sampler`` of a DataLoader.

    In an epoch every sample of a bucket comes once, in random order, cut into global batches of
    ``batch * world * accumulate`` samples; then the batches of all buckets are shuffled. Every
    epoch has an order of its own. A global batch depends on the seed, its step and its size; how
    that is split among ranks and micro-batches does not matter: micro-batch ``m`` of rank ``r``
    has the samples from ``(m * world + r) * batch`` on.

    To start at a later step costs no more than to start at the first.

    Args:
        bucket: integers ``[N]``, the bucket of each row; rows with -1 are not sampled.
        batch: samples in a micro-batch of one rank; or for each bucket, see
            :func:`token_batches`.
        world: number of ranks.
        rank: this one.
        accumulate: micro-batches of a rank in a step of the optimiser.
        seed: of the order.
        start: first step, counted from the beginning of the run.
        stop: step before which to stop; None goes on without end.
        leftover: what becomes of samples that fill no global batch of their bucket: they are
            filled up with others from it ("merge"), or come in another epoch ("drop").

    Attributes:
        steps_per_epoch: the same in every epoch.

    Raises:
        ValueError: for arguments that make no sense, or if there is no global batch.
    """

    def __init__(
        self,
        bucket: NDArray[np.integer],
        batch: int | Sequence[int],
        *,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
        leftover: Literal["merge", "drop"] = "merge",
    ) -> None:
        if world < 1 or accumulate < 1:
            raise ValueError(
                f"world and accumulate must be at least 1, got {world} and {accumulate}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in [0, {world}), got {rank}")
        if not 0 <= start <= (start if stop is None else stop):
            raise ValueError(f"start must be in [0, stop], got {start} and {stop}")
        if leftover not in ("merge", "drop"):
            raise ValueError(f"leftover must be merge or drop, got {leftover!r}")
        counts = np.bincount(bucket[bucket >= 0])
        if isinstance(batch, int):
            batch = [batch] * len(counts)
        if len(batch) < len(counts) or min(batch, default=1) < 1:
            raise ValueError(
                f"batch must be at least 1 for each of {len(counts)} buckets, got {batch}"
            )
        self.world, self.rank, self.accumulate, self.seed = world, rank, accumulate, seed
        self.start, self.stop = start, stop
        self._batch = np.array(batch[: len(counts)], np.int64)
        whole = self._batch * world * accumulate
        # Rows bucket by bucket, and how many batches each bucket makes.
        self._rows = np.argsort(bucket, kind="stable")[len(bucket) - counts.sum() :]
        self._begin = np.cumsum(counts) - counts
        self._batches = counts // whole if leftover == "drop" else -(-counts // whole)
        self._whole, self._counts = whole, counts
        self.steps_per_epoch = int(self._batches.sum())
        if not self.steps_per_epoch:
            raise ValueError(
                f"{counts.sum()} samples fill no global batch; lower batch, world or accumulate, "
                "or pass leftover='merge'"
            )

    def __len__(self) -> int:
        """Micro-batches of this rank; TypeError if there is no end."""
        if self.stop is None:
            raise TypeError("a sampler with stop=None has no length")
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        step = self.start
        while self.stop is None or step < self.stop:
            epoch, first = divmod(step, self.steps_per_epoch)
            for number, rows in itertools.islice(self._epoch(epoch), first, None):
                if step == self.stop:
                    return
                batch = int(self._batch[number])
                for micro in range(self.accumulate):
                    begin = (micro * self.world + self.rank) * batch
                    part = rows[begin : begin + batch].tolist()
                    yield [Place(step, begin + i, row) for i, row in enumerate(part)]
                step += 1

    def _epoch(self, epoch: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The global batches of an epoch: number of the bucket, and rows."""
        orders = []
        for number, (begin, count) in enumerate(zip(self._begin, self._counts, strict=True)):
            order = self._rows[begin : begin + count]
            order = numbers(self.seed, epoch, number, Use.ORDER).permutation(order)
            # The last batch is filled up from the beginning: with other samples, if there are.
            orders.append(np.resize(order, (self._batches[number], self._whole[number])))
        owner = np.repeat(np.arange(len(orders)), self._batches)
        place = np.arange(self.steps_per_epoch) - (np.cumsum(self._batches) - self._batches)[owner]
        mixed = numbers(self.seed, epoch, len(orders), Use.ORDER).permutation(self.steps_per_epoch)
        for each in mixed:
            yield int(owner[each]), orders[owner[each]][place[each]]


def token_batches(
    shapes: Sequence[tuple[int, int, int]],
    budget: int,
    *,
    patch: tuple[int, int, int] = (8, 16, 16),
) -> list[int]:
    """Samples of a micro-batch of each bucket, so that it has about ``budget`` tokens.

    Args:
        shapes: frames, height and width of each bucket, in pixels.
        budget: tokens of a micro-batch at most; but it has one sample at least.
        patch: frames (after the first), height and width that become one token.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    tokens = (
        ((frames - 1) // patch[0] + 1) * (height // patch[1]) * (width // patch[2])
        for frames, height, width in shapes
    )
    return [max(1, budget // each) for each in tokens]
