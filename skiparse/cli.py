"""The ``skiparse`` command: what each of its commands is called, and where it is declared."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from skiparse import shell

ABOUT = "Skiparse attention for video transformers."
COMMANDS = {
    "info": "skiparse.info:Info",
    "bench": "skiparse.bench.op.commands:Bench",
    "bench block": "skiparse.bench.models.commands:Block",
    "bench vae": "skiparse.bench.models.commands:VAE",
    "bench cache": "skiparse.bench.models.commands:Cache",
    "tune": "skiparse.bench.op.commands:Tune",
    "demo": "skiparse.bench.demo.commands:Demo",
    "experiment overfit": "skiparse.bench.experiments.commands:Overfit",
    "experiment clipping": "skiparse.bench.experiments.commands:Clipping",
    "experiment sparsity": "skiparse.bench.experiments.commands:Sparsity",
    "experiment retrofit": "skiparse.bench.experiments.commands:Retrofit",
    "experiment wavelets": "skiparse.bench.experiments.commands:Wavelets",
    "convert suv": "skiparse.models.suv.commands:Convert",
    "convert vae": "skiparse.models.wfvae.commands:Convert",
    "convert osp-next": "skiparse.models.wan.commands:Convert",
    "sample": "skiparse.models.commands:Sample",
    "plan": "skiparse.models.commands:Plan",
    "train": "skiparse.models.train.commands:Train",
    "export": "skiparse.models.train.commands:Export",
    "data check": "skiparse.models.data.commands:Check",
    "data import": "skiparse.models.data.commands:Import",
    "cache build": "skiparse.models.data.commands:Build",
    "cache verify": "skiparse.models.data.commands:Verify",
    "train-vae": "skiparse.models.wfvae.commands:Train",
    "eval-vae": "skiparse.models.wfvae.commands:Evaluate",
    "vae-stats": "skiparse.models.wfvae.commands:Statistics",
}
MOVED = {  # what was an option, or a command of another name
    ("overfit",): "experiment overfit",
    ("bench", "--block"): "bench block",
    ("bench", "--vae"): "bench vae",
    ("bench", "--cache"): "bench cache",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status, see :func:`skiparse.shell.main`."""
    words = sys.argv[1:] if arguments is None else arguments
    return shell.main(COMMANDS, renewed(words), about=ABOUT)


def renewed(words: Sequence[str]) -> list[str]:
    """What was asked for in words that were right once, in those of today."""
    for (first, *flags), new in MOVED.items():
        if words[:1] == [first] and all(flag in words for flag in flags):
            return [*new.split(), *(word for word in words[1:] if word not in flags)]
    return list(words)


if __name__ == "__main__":
    sys.exit(main())
