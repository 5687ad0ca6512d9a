"""Which layers should stay dense: asked of the data, one layer after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skiparse.models.retrofit.families import family_of
from skiparse.models.retrofit.model import Retrofit, Sparsity, retrofit, schedule


def choose(
    model: Any,
    loss: Callable[[Any], float],
    budget: int,
    pattern: str = "2d",
    *,
    ratio: int = 2,
    report: Callable[[int, int, float], object] | None = None,
) -> Sparsity:
    """The ``budget`` layers that are worth most when dense, by a greedy search.

    First all layers are sparse. Then the one whose density lowers the loss most becomes dense, and
    so on: with L layers that are about ``budget * L`` calls of ``loss``. A layer keeps its place
    in the alternation of single-skip and group-skip, whichever are dense.

    Args:
        model: a transformer that is not retrofitted; it comes back as it was, also on errors.
        loss: of the model, a number; over the same clips, noise and times at every call.
        budget: how many layers become dense.
        pattern, ratio: as of :class:`~skiparse.models.retrofit.model.Sparsity`.
        report: told of every pick: how many there are now, the layer, the loss with it.

    Returns:
        For ``retrofit(model, choose(...))``.

    Raises:
        ValueError: unless ``budget`` is from 0 to the number of layers.
        TypeError, ValueError: as :func:`~skiparse.models.retrofit.model.retrofit`.
    """
    layers = len(family_of(model).depths)
    if not 0 <= budget <= layers:
        raise ValueError(f"budget must be from 0 to {layers}, the layers there are; got {budget}")
    kinds = list(schedule(layers, (0, 0)))
    for number in range(1, budget + 1):
        found = []
        for layer in range(layers):
            if kinds[layer] != "dense":
                tried = [*kinds[:layer], "dense", *kinds[layer + 1 :]]
                found.append((_tried(model, loss, Sparsity(pattern, ratio, tuple(tried))), layer))
        best, layer = min(found)
        kinds[layer] = "dense"
        if report is not None:
            report(number, layer, best)
    return Sparsity(pattern, ratio, tuple(kinds))


def _tried(model: Any, loss: Callable[[Any], float], sparsity: Sparsity) -> float:
    made: Retrofit = retrofit(model, sparsity)
    try:
        return float(loss(model))
    finally:
        made.undo()
