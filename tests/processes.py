"""Runs a script of this folder in several processes that share a gloo group."""

import os
import subprocess
import sys
from pathlib import Path


def lines(script, processes, *arguments, first="case", timeout=280):
    """What process 0 prints, line by line as words, of lines that begin with ``first``."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), str(Path(__file__).with_name(script)), *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == [first]]
