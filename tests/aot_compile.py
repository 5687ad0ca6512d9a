"""Compile what the Triton launchers would launch, for a GPU that is not here; one JSON a kernel.

``python aot_compile.py sm_90 --dims 64 128``: the launchers run on meta tensors, their launches
are recorded instead of started, and each is specialised and compiled as Triton would do it on the
device. Needs TRITON_INTERPRET unset, hence its own process (see test_aot.py).
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from skiparse import SkipPattern
from skiparse.backends import Inputs, Outputs
from skiparse.backends.triton import backward, device, forward

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CONFIG_ROWS = {"sm_89": "sm_80", "sm_100": "sm_90", "sm_120": "sm_80"}  # others have their own


def launches(arch, pattern, N, D, dtype, masked):
    """What forward and backward would launch: a list of (kernel, args, kwargs)."""
    B, T, H, n = 2, 512, 24, pattern.sparsity

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    video, text = ([empty(B, rows, H, D) for _ in range(3)] for rows in (N, T))
    masks = [empty(B, rows, dtype=torch.bool) if masked else None for rows in (N, T)]
    inputs = Inputs(*video, *text, *masks, pattern, D**-0.5)
    lses = empty(B, H, N, dtype=torch.float32), empty(B, H, n, T, dtype=torch.float32)
    outputs = Outputs(empty(B, N, H, D), empty(B, n, T, H, D), *lses)

    recorded = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: recorded.append(
        (kernel, args, kwargs)
    )
    device.architecture = lambda q: CONFIG_ROWS.get(arch, arch)
    forward(inputs)
    backward(inputs, outputs, outputs.out, outputs.text_out)
    return recorded


def compile_launch(kernel, args, kwargs, target):
    """The compiled kernel, specialised by Triton's own rules."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(compiled, target):
    """Registers of a thread, spills (bytes on NVIDIA, registers on AMD) and shared memory."""
    if target.backend == "hip":
        text, names = compiled.asm["amdgcn"], (r"\.vgpr_count:\s+", r"\.vgpr_spill_count:\s+")
    else:
        text, names = _cuobjdump(compiled.asm["cubin"]), ("REG:", "STACK:", "LOCAL:")
    registers, *spills = (int(re.search(rf"{name}(\d+)", text)[1]) for name in names)
    return {"registers": registers, "spills": sum(spills), "shared": compiled.metadata.shared}


def _cuobjdump(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def offset_types(compiled):
    """The integer types that are added to pointers anywhere in the kernel."""
    found = re.findall(r"tt\.addptr .* : .*, (?:tensor<[\dx]+x)?(i\d+)", compiled.asm["ttir"])
    return sorted(set(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=TARGETS)
    parser.add_argument("--dims", type=int, nargs="+", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--masked", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--run", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=36864)
    args = parser.parse_args()
    target, pattern = TARGETS[args.arch], SkipPattern(8, args.run)
    for D in args.dims:
        for masked in map(bool, args.masked):
            recorded = launches(
                args.arch, pattern, args.tokens, D, getattr(torch, args.dtype), masked
            )
            for kernel, arguments, options in recorded:
                compiled = compile_launch(kernel, arguments, options, target)
                row = {"kernel": kernel.__name__, "arch": args.arch, "D": D, "masked": masked}
                row |= resources(compiled, target) | {"offsets": offset_types(compiled)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
