"""Two processes whose SUV, in shards, gets its skips: `torchrun --nproc-per-node 2 entering.py`.

What is sent for that is counted, and the largest tensor that a process makes on the way.
"""

import sys

import torch
import torch.distributed as dist
from parallel_run import far
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from skiparse.models.data.buckets import Rule
from skiparse.models.suv.model import SUV
from skiparse.models.suv.recipe import SUVConfig, SUVStage
from skiparse.models.train.parallel import World
from skiparse.models.train.state import entered


class Made(TorchDispatchMode):
    """Collectives that are called, and bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its shards come by afterwards
        out = func(*args, **(kwargs or {}))
        if "c10d" in func.name():
            self.calls.append(func.name())
        for x in out if isinstance(out, tuple | list) else (out,):
            real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)  # without memory
            if real and x.device.type != "meta":
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def main():
    stage = {"steps": 1, "learning_rate": 1.0, "global_batch": 2, "rule": Rule(size=(32, 32))}
    config = SUVConfig(
        out="unused",
        preset="tiny",
        stages={
            "dense": SUVStage(**stage, skip_connection=False, sparsity=(1,) * 5),
            "suv": SUVStage(**stage),
        },
        cache="unused",
        parallel="fsdp",
        device="cpu",
    )
    with World.joined("cpu") as world:
        before = entered(None, config.stages["dense"], config, world)
        with torch.no_grad():
            for i, x in enumerate([*before.model.parameters(), *before.ema.model.parameters()]):
                x.add_(0.1 * i)
        whole = [
            {name: x.full_tensor().clone() for name, x in model.state_dict().items()}
            for model in (before.model, before.ema.model)
        ]
        with Made() as made:
            after = entered(before, config.stages["suv"], config, world)
        bytes_of = max(x.numel() * 4 for x in after.model.skips[0].parameters())
        shards = max(x.to_local().numel() * 4 for x in after.model.parameters())
        errors = []
        for state, model in zip(whole, (after.model, after.ema.model), strict=True):
            dense = SUV(**SUV.presets["tiny"] | {"skip_connection": False})
            dense.load_state_dict(state)
            wanted = SUV.from_dense(dense, sparsity=SUV.presets["tiny"]["sparsity"])
            found = [x.full_tensor() for x in model.state_dict().values()]
            errors.append(far(found, [*wanted.state_dict().values()]))
        held = sum(x.to_local().numel() for x in after.model.parameters())
        numbers = sum(x.numel() for x in wanted.parameters())
        if dist.get_rank() == 0:
            print("case", len(made.calls), made.largest, max(bytes_of, shards), held, numbers,
                  *errors, after.model.training, after.ema.model.training, flush=True)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
