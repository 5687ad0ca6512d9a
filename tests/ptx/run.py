"""The project's own launches, executed: forward, backward, ping-pong and packing on a CPU.

In a process without ``TRITON_INTERPRET``:
``Machine("sm_90").run(lambda: forward(inputs), tensors)``.
"""

import statistics
import time
from collections import Counter

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptx.driver import Recorder
from ptx.machine import Launch, execute
from ptx.memory import GlobalMemory
from skiparse.backends import Inputs
from skiparse.backends.triton import backward_kernel, device, forward_kernel, pack_kernel
from skiparse.testing import Answer, oracle

CAPABILITIES = {"sm_80": 80, "sm_90": 90}
# Triton 3.6 lets wgmma read what cp.async brought without a fence between; 3.7 fences.
FENCES_COPIES = not triton.__version__.startswith("3.6.")


class Tensors(TorchDispatchMode):
    """Keeps every tensor that is used or made while it is entered."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.seen += [x for x in tree_leaves((args, made)) if isinstance(x, torch.Tensor)]
        return made


class Machine:
    """A GPU of one architecture; one for each process, because Triton has one active driver."""

    def __init__(self, arch):
        self.recorder = Recorder(CAPABILITIES[arch])
        device.architecture = pack_kernel.architecture = lambda q: arch
        device.exact_architecture = lambda q: arch
        device.multiprocessors = lambda q: 2  # so that persistent programs have several tasks
        torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
        self.counts = Counter()  # what was executed: steps, kernels, copies, ...
        self.seconds = Counter()  # by kernel
        self.edited = set()  # the kernels that ran with other PTX than their own

    def run(self, function, tensors, *, mode="late", seed=0, edit=None):
        """What ``function`` returns, every launch in it executed as it comes.

        ``tensors`` are those that kernels may touch besides what ``function`` makes;
        ``edit`` is a function of kernel name and PTX that gives the PTX to execute.
        """
        known = Tensors()
        known.seen += tensors

        def on_launch(kernel, grid, threads, shared, values):
            memory = GlobalMemory()
            for x in known.seen:
                storage = x.untyped_storage()
                memory.add(storage.data_ptr(), storage.nbytes(), f"{x.dtype} {tuple(x.shape)}")
            text = kernel.ptx if edit is None else edit(kernel.name, kernel.ptx)
            if text != kernel.ptx:
                self.edited.add(kernel.name)
            schedule = kernel.schedule(text)
            parameters = schedule.program.parameters
            raw = np.zeros(max(p.offset + p.size for p in parameters), np.uint8)
            for parameter, value in zip(parameters, values, strict=True):
                raw[parameter.offset :][: parameter.size] = np.frombuffer(value, np.uint8)
            maps = self.recorder.tensor_maps
            launch = Launch(schedule, grid, threads, shared, raw, memory, maps, FENCES_COPIES)
            begin = time.perf_counter()
            self.counts += execute(launch, mode, seed)
            self.counts[kernel.name] += 1
            self.seconds[kernel.name] += time.perf_counter() - begin

        self.recorder.on_launch = on_launch
        try:
            with known:
                return function()
        finally:
            self.recorder.on_launch = None
            self.recorder.check()

    def launch_time(self, function, repeats=200):
        """Median seconds of Python and C that ``function`` takes to launch, nothing executed."""
        function()  # compiles
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        self.recorder.check()
        return statistics.median(times)


def inputs_of(problem):
    p = problem
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, scale)


def tensors_of(problem):
    """What a forward may read."""
    return [x for x in (*problem.inputs, problem.mask, problem.text_mask) if x is not None]


def attention(machine, problem, *, kernel=forward_kernel, backward=True, outputs=None, **how):
    """Outputs and gradients of a problem (a ``skiparse.testing.Answer``), all executed.

    Without ``backward`` the gradients are the exact ones; ``outputs`` are those of a forward that
    was executed before.
    """
    n, inputs = problem.pattern.sparsity, inputs_of(problem)
    if outputs is None:
        outputs = machine.run(lambda: kernel.forward(inputs), tensors_of(problem), **how)
    if backward:
        text = (problem.grad_text_out / n)[:, None].expand(-1, n, -1, -1, -1)
        grads = machine.run(
            lambda: backward_kernel.backward(inputs, outputs, problem.grad_out, text),
            [*tensors_of(problem), *outputs, problem.grad_out, text],
            **how,
        )
    else:
        grads = oracle(problem)[4:]
    out, text_out, lse, text_lse = outputs
    return Answer(out, text_out.mean(1), lse, text_lse, *grads)
