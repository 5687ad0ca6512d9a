"""The compiled kernels compute attention: their PTX is executed on a CPU by the machine in ptx/."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if shutil.which("g++") is None:
    pytest.skip("the recording libcuda needs g++", allow_module_level=True)


def execute(arch, *parts):
    """The rows of ``python -m ptx``, run without the interpreter."""
    command = [sys.executable, "-m", "ptx", arch, *parts]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_attention_on_hopper():
    """Forward by tensor copies, delta, dk and dv, dq; then ping-pong."""
    for row in execute("sm_90", "quick", "quick_pingpong"):
        print(row)
