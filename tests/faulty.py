"""`skiparse train` in which a process is lost: `torchrun ... faulty.py dies|hangs RANK CALL FILE`.

At its so many-th micro-batch, counted from 1.
"""

import itertools
import os
import signal
import sys
import time

from skiparse import cli
from skiparse.models.train import loop

how, rank, call, file = sys.argv[1:]
calls, real = itertools.count(1), loop.loss_of


def loss_of(*arguments):
    if os.environ["RANK"] == rank and next(calls) == int(call):
        print("lost at", time.time(), flush=True)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    return real(*arguments)


loop.loss_of = loss_of
sys.exit(cli.main(["train", file]))
