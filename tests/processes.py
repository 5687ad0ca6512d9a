"""Runs a script of this folder in several processes that share a gloo group."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(processes, *arguments, timeout=280, end=5):
    """A script or ``-m`` module under torchrun; ``end``: seconds from SIGTERM to SIGKILL."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout",
        str(end), "--nproc-per-node", str(processes), *map(str, arguments),
    ]  # fmt: skip
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def lines(script, processes, *arguments, first="case", timeout=280):
    """What process 0 prints, line by line as words, of lines that begin with ``first``."""
    done = torchrun(processes, Path(__file__).with_name(script), *arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == [first]]
