"""What reaches CUDA with plans, and what it costs; on the libcuda that records, without a GPU.

In a process without ``TRITON_INTERPRET``, with ``tests/`` in PYTHONPATH:
``python tests/launches.py check``, or ``threads``, ``hooks``, ``time``.
"""

import argparse
import ctypes
import functools
import json
import statistics
import threading
import time

import torch
import triton
from ptx.driver import Recorder
from ptx.tma import MAGIC
from triton.runtime.jit import JITFunction

from skiparse import SkipPattern
from skiparse.backends import Inputs
from skiparse.backends.triton import (
    backward_kernel,
    device,
    forward_kernel,
    pack_kernel,
    pingpong_kernel,
    plans,
)
from skiparse.testing import make_problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINGLE, GROUP = SkipPattern.single(2), SkipPattern.group(4)
SIZE = {"B": 1, "H": 1, "D": 64}
NEW_EMPTY = torch.Tensor.new_empty


class Arena:
    """Stands in for ``new_empty``: the same addresses every time after ``reset``."""

    def __init__(self):
        self.memory = torch.empty(1 << 26, dtype=torch.uint8)
        self.reset()

    def reset(self):
        self.used = -self.memory.data_ptr() % 512

    def new_empty(self, x, *shape, dtype=None):
        if len(shape) == 1 and not isinstance(shape[0], int):
            (shape,) = shape
        meta = torch.empty(shape, dtype=dtype or x.dtype, device="meta")
        end = self.used + meta.numel() * meta.element_size()
        made = self.memory[self.used : end].view(meta.dtype).view(meta.shape)
        self.used = -(-end // 512) * 512
        return made


class Watch:
    """Every launch of a call as CUDA gets it: kernel, grid, threads, shared memory, parameters."""

    def __init__(self, arch="sm_90"):
        self.recorder = Recorder({"sm_80": 80, "sm_90": 90}[arch])
        device.architecture = device.exact_architecture = lambda q: arch
        pack_kernel.architecture = device.architecture
        device.multiprocessors = lambda q: 132
        self.arena = Arena()
        self.launches = []
        self.recorder.on_launch = lambda *launch: self.launches.append(launch)

    def of(self, function):
        """Those of ``function()``; a tensor map is what it says, not where it lies."""
        self.launches = []
        self.arena.reset()
        torch.Tensor.new_empty = lambda x, *a, **k: self.arena.new_empty(x, *a, **k)
        try:
            function()
        finally:
            torch.Tensor.new_empty = NEW_EMPTY
        self.recorder.check()
        return [
            (*launch[:4], [self.read(value) for value in launch[4]]) for launch in self.launches
        ]

    def read(self, value):
        if len(value) == 128 and int.from_bytes(value[:8], "little") == MAGIC:
            return self.recorder.tensor_maps[int.from_bytes(value[8:16], "little")]
        return value


def by_triton(launcher, tensors, *settings):
    """In place of ``planned``: every launch by Triton's own path."""
    return list(launcher(tensors, *settings))


def moved(x, elements=1):
    """The same, ``elements`` behind an aligned address."""
    return torch.empty(x.numel() + elements, dtype=x.dtype)[elements:].view(x.shape).copy_(x)


def inputs(pattern=SINGLE, dtype=FP16, scale=0.1, move=None, first=None, **size):
    p = make_problem(pattern, dtype=dtype, **{"N": 64, "T": 5, **SIZE, **size})
    tensors = dict(zip(Inputs.__dataclass_fields__, p.inputs, strict=False))
    if move is not None:
        tensors[move] = moved(tensors[move])
    for name in ("q", "k", "v") if first is not None else ():
        tensors[name] = tensors[name][:, :first]
    return Inputs(**tensors, mask=p.mask, text_mask=p.text_mask, pattern=pattern, scale=scale)


# Each differs from another in one thing that decides which kernel it is or what it is given.
FORWARDS = {
    "plain": {"N": 63},
    "scale": {"N": 63, "scale": 0.2},
    "negative-scale": {"N": 63, "scale": -0.1},
    "longer": {"N": 65},
    "sliced": {"N": 65, "first": 63},
    "q-moved": {"N": 63, "move": "q"},
    "text-moved": {"N": 63, "move": "text_k"},
    "dtype": {"N": 63, "dtype": BF16},
    "fp32": {"N": 63, "dtype": FP32},
    "packed": {"N": 63, "layout": "packed"},
    "heads": {"N": 63, "H": 2},
    "masked": {"N": 63, "masked": True},
    "no-text": {"N": 63, "T": 0},
    "nothing": {"N": 0, "T": 0},
    "group": {"N": 63, "pattern": GROUP},
    "tiles": {},
    "tiles-moved": {"move": "v"},
    "tiles-longer": {"N": 128},
    "tiles-no-text": {"T": 0},
}


def by_pointers(call):
    """``call()`` with no configuration for the kernel that has tiles."""
    kept, forward_kernel.TMA_CONFIGS = forward_kernel.TMA_CONFIGS, {}
    try:
        call()
    finally:
        forward_kernel.TMA_CONFIGS = kept


def calls():
    """Functions of no arguments that launch, by name; made once, as addresses are compared."""

    def backward(x):
        outputs = forward_kernel.allocate(x)
        grad = torch.empty_like(outputs.text_out[:, :1]).expand_as(outputs.text_out)
        return functools.partial(backward_kernel.backward, x, outputs, outputs.out, grad)

    made = {}
    for name, how in FORWARDS.items():
        made[name] = functools.partial(forward_kernel.forward, inputs(**how))
    made["pointers"] = functools.partial(by_pointers, made["tiles"])
    for name in ("plain", "packed", "no-text", "text-moved"):
        made[f"backward-{name}"] = backward(inputs(**FORWARDS[name]))
    for name, how in {
        "pingpong": {},
        "pingpong-longer": {"N": 128},
        "pingpong-masked": {"masked": True},
    }.items():
        x = inputs(SkipPattern.dense(), **how)
        made[name] = functools.partial(pingpong_kernel.forward, x)
    x = inputs(N=64)
    norms = [torch.empty(64, dtype=FP16) for _ in range(4)]
    given = ([x.q, x.k, x.v], [x.text_q, x.text_k, x.text_v], norms[:2], norms[2:])
    turns = torch.empty(64, 32), torch.empty(64, 32)
    made["pack"] = functools.partial(pack_kernel.forward, *given, *turns, [64], 1e-6, 2, 1)
    made["pack-axes"] = functools.partial(pack_kernel.forward, *given, *turns, [32, 32], 1e-6, 2, 1)
    return made


def check(watch):
    """The calls whose launches are not those of Triton's own path; so without parts of the key."""
    modules = (forward_kernel, backward_kernel, pingpong_kernel, pack_kernel)
    made, planned = calls(), plans.planned
    own = {}
    for module in modules:
        module.planned = by_triton
    for name, call in made.items():
        own[name] = watch.of(call)
    for module in modules:
        module.planned = planned
    found = {
        "launches": sum(map(len, own.values())),
        "kernels": len({id(launch[0]) for launches in own.values() for launch in launches}),
        "whole key": compare(watch, made, own),
    }
    kept = plans._key, plans._plan
    for part in PARTS:
        plans._plan.cache_clear()
        leave_out(part)
        found[part] = compare(watch, made, own)
        plans._key, plans._plan = kept
    return found


def compare(watch, made, own):
    """For the first and the second time of asking: the wrong ones, and launches through Triton."""
    run, through_triton, rows = JITFunction.run, [], []

    def counted(kernel, *args, **options):
        through_triton.append(kernel)
        return run(kernel, *args, **options)

    JITFunction.run = counted
    for _ in range(2):
        through_triton.clear()
        wrong = [name for name, call in made.items() if attempt(watch, call) != own[name]]
        rows.append({"wrong": wrong, "through_triton": len(through_triton)})
    JITFunction.run = run
    return rows


PARTS = ("shape", "strides", "dtype", "residue", "scale", "pattern", "config")


def attempt(watch, call):
    """What is launched, or what is refused: a tensor map of a wrong address, say."""
    try:
        return watch.of(call)
    except Exception as error:
        watch.recorder.errors.clear()
        return repr(error)


def leave_out(part):
    """Make plans forget a part of their key."""
    if part in PARTS[:4]:
        key, kept = plans._key, {}

        def forgetful(x):
            # As it was for the first tensor alike in everything else, as a plan would take it.
            whole, i = key(x), PARTS.index(part)
            rest = whole[:i] + whole[i + 1 :]
            return kept.setdefault(rest, whole)

        plans._key = forgetful
    else:
        plan, first = plans._plan, {}
        kind = {"scale": float, "pattern": SkipPattern, "config": device.Config}[part]

        def forgetful_plan(launcher, device, keys, settings, compilation):
            rest = tuple(x for x in settings if x is not None and not isinstance(x, kind))
            settings = first.setdefault((launcher, keys, rest), settings)
            return plan(launcher, device, keys, settings, compilation)

        plans._plan = forgetful_plan


def threads(watch):
    """The launches of many threads at once, each with tensors of its own: all there, none mixed."""
    given = [inputs(N=63) for _ in range(8)]
    wanted = {tuple(x.data_ptr() for x in (y.q, y.k, y.v)) for y in given}
    watch.launches = []
    plans._plan.cache_clear()
    at_once = threading.Barrier(len(given))

    def work(x):
        at_once.wait()
        for _ in range(25):
            forward_kernel.forward(x)

    workers = [threading.Thread(target=work, args=(x,)) for x in given]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    watch.recorder.check()
    seen = [
        tuple(
            address
            for value in launch[4]
            if len(value) == 8
            for address in [int.from_bytes(value, "little")]
            if any(address in w for w in wanted)
        )
        for launch in watch.launches
    ]
    return {"launches": len(seen), "mixed": sum(addresses not in wanted for addresses in seen)}


def hooks(watch):
    """What hooks into Triton see of a call that has a plan, and settings of Triton that change."""
    x, seen = inputs(N=63), []
    for _ in range(2):
        forward_kernel.forward(x)
    knobs = triton.knobs.runtime

    def entered(metadata):
        seen.append(metadata.get()["name"])

    knobs.launch_enter_hook.add(entered)
    forward_kernel.forward(x)
    knobs.launch_enter_hook.remove(entered)
    kernel = forward_kernel.skiparse_forward

    def before(*args, **options):
        seen.append(f"{len(args)} args")

    kernel.add_pre_run_hook(before)
    forward_kernel.forward(x)
    kernel.pre_run_hooks.remove(before)
    kernels = watch.recorder.kernels
    compiled = []
    for debug in (True, False, True):
        before, knobs.debug = len(kernels), debug
        forward_kernel.forward(x)
        watch.recorder.errors.clear()  # this PTX has calls, which nothing here reads
        compiled.append(len(kernels) - before)
    return {"seen": seen, "compiled": compiled}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "threads", "hooks", "time"))
    args = parser.parse_args()
    torch.manual_seed(0)
    what = {"check": check, "threads": threads, "hooks": hooks, "time": timed}[args.what]
    print(json.dumps(what(Watch())))


def timed(watch, rounds=300):
    """Median microseconds of a call by Triton's own path and by its plan, taking turns."""
    library = watch.recorder.library
    nothing = library.cuCtxSetLimit  # returns that all is well
    library.record(*(ctypes.cast(nothing, ctypes.c_void_p) for _ in range(2)))
    modules = (forward_kernel, backward_kernel, pingpong_kernel, pack_kernel)
    ways = {"triton": by_triton, "plan": plans.planned}
    made, table = calls(), {}
    for name in ("tiles", "plain", "pingpong", "backward-plain", "pack"):
        times = {way: [] for way in ways}
        for _ in range(rounds):
            for way, planned in ways.items():
                for module in modules:
                    module.planned = planned
                begin = time.perf_counter()
                made[name]()
                times[way].append(1e6 * (time.perf_counter() - begin))
        table[name] = {way: round(statistics.median(taken), 1) for way, taken in times.items()}
    return table


if __name__ == "__main__":
    main()
