"""The twin takes tensors by address: each is checked before anything is read or written."""

import re

import built
import pytest
import torch

from csrc.twin import launch
from skiparse import SkipPattern
from skiparse.testing import make_problem

built.require_tools(allow_module_level=True)

B, N, T, H, D = 2, 37, 5, 3, 64


@pytest.fixture(scope="module")
def library():
    return built.twin()


def tensors(backward=False):
    """All of a call, by name."""
    p = make_problem(SkipPattern(3, 2), B=B, N=N, T=T, H=H, D=D, dtype=torch.float16, masked=True)
    n, half = 3, torch.float16
    found = {name: getattr(p, name) for name in (*launch.INPUTS, "mask", "text_mask")}
    found |= {
        "out": torch.zeros(B, N, H, D, dtype=half),
        "text_out": torch.zeros(B, n, T, H, D, dtype=half),
        "lse": torch.zeros(B, H, N),
        "text_lse": torch.zeros(B, H, n, T),
    }
    if backward:
        found |= {
            "grad_out": torch.zeros(B, N, H, D, dtype=half),
            "grad_text_out": torch.zeros(B, n, T, H, D, dtype=half),
            **{f"grad_{name}": torch.zeros_like(found[name]) for name in launch.INPUTS},
        }
    return found


def call(library, given, *, backward=False, model=None, **settings):
    arrays = launch.arrays(library, given)
    settings = {"sparsity": 3, "run": 2, "scale": 0.125, "cores": 2, "variant": 0} | settings
    model = launch.model_of(library, **(model or {}))
    if backward:
        settings = {"most_in_part": 40} | settings
        return library.backward(arrays, **settings, model=model)
    return library.forward(arrays, **settings, model=model)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_is_right_is_taken(library, backward):
    lanes, buffers, _ = call(library, tensors(backward), backward=backward)
    assert lanes
    assert buffers["q"][0] == B * N * H * D * 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda x: x[:, :5], "k must have shape [2, 37, 3, 64], got [2, 5, 3, 64]"),
        ("k", lambda x: x.bfloat16(), "k must be of float16, not of bfloat16"),
        ("k", lambda x: x.mT.contiguous().mT, "k must have last stride 1, got strides"),
        ("k", lambda x: x.to("meta"), "k must lie on the CPU, not on meta"),
        ("k", lambda x: None, "k is missing"),
        ("q", lambda x: x.float(), "q must be of float16 or bfloat16, not of float32"),
        ("q", lambda x: x[0], "q must have shape [B, N, H, D], got [37, 3, 64]"),
        ("q", lambda x: x[..., :16], "q must have a head dimension of 64 or 128, got 16"),
        ("text_q", lambda x: x[0], "text_q must have shape [B, T, H, D], got [5, 3, 64]"),
        ("text_v", lambda x: x[:, :4], "text_v must have shape [2, 5, 3, 64], got [2, 4, 3, 64]"),
        ("mask", lambda x: x.float(), "mask must be of bool, not of float32"),
        ("mask", lambda x: x.t().contiguous().t(), "mask must be contiguous, got strides [1, 2]"),
        ("text_mask", lambda x: x[:, 1:], "text_mask must have shape [2, 5], got [2, 4]"),
        ("lse", lambda x: x.double(), "lse must be of float32, not of float64"),
        ("text_out", lambda x: x[:, :1], "text_out must have shape [2, 3, 5, 3, 64], got"),
        ("out", lambda x: x.mT.contiguous().mT, "out must be contiguous, got strides"),
        ("grad_lse", lambda _: torch.zeros(1), "grad_lse is no tensor of this pass"),
    ],
)
def test_wrong_tensors_are_refused_before_anything_is_done(library, name, change, message):
    given = tensors()
    outputs = {n: given[n] for n in launch.OUTPUTS}
    changed = change(given.get(name))
    given = {n: x for n, x in (given | {name: changed}).items() if x is not None}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(library, given)
    assert not any(x.any() for x in outputs.values())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("grad_out", lambda x: x[:, :5], "grad_out must have shape [2, 37, 3, 64]"),
        ("grad_text_out", lambda x: x[:, 0], "grad_text_out must have shape [2, 3, 5, 3, 64]"),
        ("grad_q", lambda x: x.mT.contiguous().mT, "grad_q must be contiguous"),
        ("grad_text_k", lambda x: x.float(), "grad_text_k must be of float16, not of float32"),
        ("lse", lambda x: x.mT.contiguous().mT, "lse must be contig"),
    ],
)
def test_of_the_backward_pass_too(library, name, change, message):
    given = tensors(backward=True)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(library, given, backward=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0}, "sparsity must be at least 1, got 0"),
        ({"run": -2}, "run must be at least 1, got -2"),
        ({"cores": 0}, "cores must be at least 1, got 0"),
        ({"variant": 1}, "variant must be below 1, got 1"),
        ({"variant": -1}, "variant must be below 1, got -1"),
        ({"model": {"core": 2}}, "core must be -1, for all, or below 2, got 2"),
        ({"scale": -1.0, "model": {"half_scores": True}}, "half_scores needs a positive scale"),
        ({"most_in_part": 0, "backward": True}, "most_in_part must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(library, settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(library, tensors(settings.get("backward", False)), **settings)


def test_costs_need_shapes_alone(library):
    given = {name: x.to("meta") for name, x in tensors().items()}
    executed = call(library, tensors())
    counted = call(library, given, model={"costs_only": True})
    biases = 2  # lanes of the first kernel, which does more where a mask hides more
    assert counted[0][biases:] == executed[0][biases:]
    assert counted[1:] == executed[1:]
