"""The original implementation's own outputs and gradients come out, mask and padding included.

`tests/data/README.md` tells where they come from. Their layout is [tokens, batch, heads * dim].
"""

from pathlib import Path

import pytest
import torch
from backends import MATRIX, SMALL
from safetensors.torch import load_file

import skiparse
from skiparse import SkipPattern

FILE = Path(__file__).parent / "data" / "skiparse_attention.safetensors"
GOLDEN = load_file(FILE)
CASES = sorted({name.split(".", 1)[1].rsplit(".", 1)[0] for name in GOLDEN if name[:4] == "out."})
HEADS, DIM = 3, 16
FORWARD, BACKWARD = 2e-5, 1e-4  # relative to max|golden|: what fp32 of the original allows


def to_bnhd(x):
    return x.unflatten(-1, (HEADS, DIM)).transpose(0, 1)


def from_bnhd(x):
    return x.transpose(0, 1).flatten(-2)


def test_there_are_cases():
    assert len(CASES) >= 10


FEW = ("N72.k4.group.vmask", "N72.k8.single")  # for backends that are slow here


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *((case, backend) for case in CASES for backend in MATRIX),
        *((case, backend) for case in FEW for backend in SMALL if backend not in MATRIX),
    ],
)
def test_golden(case, backend):
    device = "cpu" if backend in MATRIX or not torch.cuda.is_available() else "cuda"
    N, k, kind, *masked = case.split(".")
    pattern = getattr(SkipPattern, kind)(int(k[1:]))
    given = {n: GOLDEN[f"in.{N}.{n}"] for n in ("q", "k", "v", "tq", "tk", "tv", "gv", "gt")}
    names = ("q", "k", "v", "tq", "tk", "tv")
    inputs = [to_bnhd(given[n]).to(device).requires_grad_() for n in names]
    mask = GOLDEN[f"in.{N}.video_mask_partial"].bool().to(device) if masked else None
    text_mask = GOLDEN["in.text_mask"].bool().to(device)
    outputs = skiparse.joint_attention(
        *inputs, pattern, mask=mask, text_mask=text_mask, backend=backend
    )
    upstream = [to_bnhd(given[n]).to(device) for n in ("gv", "gt")]
    grads = torch.autograd.grad(outputs, inputs, upstream)
    names = ("ov", "ot", "dq", "dk", "dv", "dtq", "dtk", "dtv")
    for name, x in zip(names, (*outputs, *grads), strict=True):
        golden = GOLDEN[f"out.{case}.{name}"]
        error = (from_bnhd(x).cpu() - golden).abs().max() / golden.abs().max()
        assert error <= (FORWARD if name[0] == "o" else BACKWARD), f"{name}: {error:.2e}"
