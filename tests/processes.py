"""Runs a script of this folder in several processes that share a gloo group."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

# Processes of tests are forked from one that has loaded all this: each would need six seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "skiparse.cli", "skiparse.models.data.cache", "skiparse.models.suv.recipe",
    "skiparse.models.train.core", "skiparse.models.wan.recipe", "skiparse.models.wfvae.train",
    "torch.distributed.fsdp", "pytest",
])  # fmt: skip


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


def together(processes, script, *arguments, timeout=280):
    """A script of this folder, or elsewhere, in processes that find what torchrun would tell them.

    They are forked, which saves what imports cost. The first that fails ends all.
    """
    script = Path(__file__).parent / script
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": script.stem,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            told = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            files = [str(Path(folder, f"{name}{rank}")) for name in ("out", "err")]
            words = [str(script), *map(str, arguments)]
            started.append(PROCESSES.Process(target=_one, args=(words, told, *files)))
            started[-1].start()
        end = time.monotonic() + timeout
        running = set(started)
        while running:
            ended = wait([one.sentinel for one in running], end - time.monotonic())
            running = {one for one in running if one.sentinel not in ended}
            if not ended or any(one.exitcode for one in started if one not in running):
                for one in running:
                    one.kill()
            for one in started:
                if one not in running:
                    one.join()
        out, err = (
            "".join(Path(folder, f"{name}{rank}").read_text() for rank in range(processes))
            for name in ("out", "err")
        )
    status = next((one.exitcode for one in started if one.exitcode), 0)
    return subprocess.CompletedProcess([script, *arguments], status, out, err)


def _one(words, told, out, err):
    os.environ.update(told)
    for number, path in ((1, out), (2, err)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv, sys.path = words, [str(Path(words[0]).parent), *sys.path]
    runpy.run_path(words[0], run_name="__main__")


def lines(script, processes, *arguments, first="case", timeout=280):
    """What process 0 prints, line by line as words, of lines that begin with ``first``."""
    done = together(processes, script, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == [first]]
