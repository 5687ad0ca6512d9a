"""Recordings of the original implementation, with the random weights it ran with made anew.

The weights of the recorded models are random and come from a seed, so the files leave them out:
shape, mean and standard deviation of each stand in the file's metadata, with a checksum that the
ones made here must have.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open

DATA = Path(__file__).parent / "data"


def load(name):
    """All tensors of ``tests/data/<name>``; the weights, exact in bf16, as fp32 under ``w.*``."""
    with safe_open(DATA / name, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        about = json.loads(file.metadata()["weights"])
    generator = torch.Generator().manual_seed(about["seed"])
    digest = hashlib.sha256()
    for key, (shape, mean, std) in sorted(about["tensors"].items()):
        weight = (mean + std * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        digest.update(weight.view(torch.uint8).numpy().tobytes())
        tensors[f"w.{key}"] = weight.float()
    assert digest.hexdigest() == about["sha256"], "this torch draws other random numbers"
    return tensors
