"""Compile what the Triton launchers would launch, for a GPU that is not here; one JSON a kernel.

``python aot_compile.py sm_90 --dims 64 128``: the launchers run on meta tensors, their launches
are recorded instead of started, and each is specialised and compiled as Triton would do it on the
device. Needs TRITON_INTERPRET unset, hence its own process (see test_aot.py).

``python aot_compile.py all --write data/aot.json`` puts the table that test_aot.py compares with
anew, for the Triton that is installed; rows of other releases of Triton stay, and with the name of
an architecture instead of ``all`` those of others.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from skiparse import GridPattern, SkipPattern
from skiparse.backends import Inputs, Outputs
from skiparse.backends.triton import (
    backward,
    backward_kernel,
    device,
    forward,
    forward_kernel,
    pingpong,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
CONFIG_ROWS = {  # others have their own
    "sm_89": "sm_80",
    "sm_100": "sm_90",
    "sm_120": "sm_80",
    "gfx950": "gfx942",
}
TABLE_DIMS = (64, 128, 256)  # of the table, in bf16, with and without key masks
# What is counted in the main loop: matrix products; copies from global memory (by tensor map, to
# shared memory, to registers); shared memory read and written; local memory, where spills go.
COUNTED = {
    "cuda": ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDG", "LDSM", "LDS", "STS",
             "LDL", "STL"),
    "hip": ("v_mfma", "buffer_load", "global_load", "ds_read", "ds_write", "scratch_"),
}  # fmt: skip
PRODUCTS = r"\b(HGMMA|HMMA|UTCHMMA|v_mfma)"


def launches(arch, pattern, N, D, dtype, masked):
    """What forward and backward would launch: a list of (kernel, args, kwargs).

    Every kernel, where some need strides that these have and others have not.
    """
    B, T, H, n = 2, 512, 24, pattern.sparsity

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    video, text = ([empty(B, rows, H, D) for _ in range(3)] for rows in (N, T))
    masks = [empty(B, rows, dtype=torch.bool) if masked else None for rows in (N, T)]
    inputs = Inputs(*video, *text, *masks, pattern, D**-0.5)
    lses = empty(B, H, N, dtype=torch.float32), empty(B, H, n, T, dtype=torch.float32)
    outputs = Outputs(empty(B, N, H, D), empty(B, n, T, H, D), *lses)

    grads = outputs.out, outputs.text_out[:, :1].expand(-1, n, -1, -1, -1)  # as of a mean

    recorded = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: recorded.append(
        (kernel, args, kwargs)
    )
    device.architecture = lambda q: CONFIG_ROWS.get(arch, arch)
    device.exact_architecture = lambda q: arch
    device.multiprocessors = lambda q: 132
    forward(inputs)
    tiles = forward_kernel.TMA_CONFIGS
    if arch in tiles and recorded[0][0] is forward_kernel.skiparse_forward_tma:
        forward_kernel.TMA_CONFIGS = {}  # what runs there if the strides are irregular
        forward(inputs)
        forward_kernel.TMA_CONFIGS = tiles
    if arch == "sm_90" and pingpong._takes(inputs) is None:
        pingpong.forward(inputs)
    backward(inputs, outputs, *grads)
    if recorded[-1][0] is backward_kernel.skiparse_dq_tma:
        tiles = backward_kernel.DKDV_TMA_CONFIGS, backward_kernel.DQ_TMA_CONFIGS
        backward_kernel.DKDV_TMA_CONFIGS = backward_kernel.DQ_TMA_CONFIGS = {}
        backward(inputs, outputs, *grads)
        backward_kernel.DKDV_TMA_CONFIGS, backward_kernel.DQ_TMA_CONFIGS = tiles
        del recorded[-3]  # the sums of rows again
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
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, constants, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(compiled, target):
    """Registers of a thread, spills (bytes on NVIDIA, registers on AMD) and shared memory."""
    if target.backend == "hip":
        text, names = compiled.asm["amdgcn"], (r"\.vgpr_count:\s+", r"\.vgpr_spill_count:\s+")
    else:
        text, names = _cuobjdump(compiled.asm["cubin"]), ("REG:", "STACK:", "LOCAL:")
    registers, *spills = (int(re.search(rf"{name}(\d+)", text)[1]) for name in names)
    return {"registers": registers, "spills": sum(spills), "shared": compiled.metadata.shared}


def main_loop(compiled, target):
    """How many instructions of each kind in ``COUNTED`` the loop over the video has."""
    return count(COUNTED[target.backend], loop_over_video(compiled, target), target)


INSTRUCTION = {"cuda": r"^\s+/\*[0-9a-f]{4,}\*/", "hip": r"^\s+(s|v|ds|global|buffer|flat)_"}


def turn(compiled, target, options):
    """What the main loop issues each time: instructions in all, and for which rows.

    ``rows`` are of queries and of keys. ``waits`` for products of a warpgroup: one for each
    product, where ptxas could not leave them under way together.
    """
    loop = loop_over_video(compiled, target)
    if not loop:
        return {}
    found = {"instructions": sum(bool(re.match(INSTRUCTION[target.backend], x)) for x in loop)}
    found["rows"] = [options["BLOCK_M"], options["BLOCK_N"]]
    waits = sum("WARPGROUP.DEPBAR" in x for x in loop)
    return found | ({"waits": waits} if waits else {})


def roles(compiled, target):
    """What all roles have, and the exponentials of a turn while products are under way."""
    found = count(("HGMMA", "UTMALDG", "USETMAXREG"), sass(compiled), target)
    loop = loop_over_video(compiled, target)
    scores, values = (
        next(i for i, text in enumerate(loop) if re.search(rf"DEPBAR\.LE gsb0, 0x{n}\b", text))
        for n in (1, 0)
    )
    return found | {"MUFU.EX2": count(("MUFU.EX2",), loop[scores:values], target)["MUFU.EX2"]}


def count(names, lines, target):
    word = r"\b" if target.backend == "cuda" else ""  # LDS is not LDSM; v_mfma goes on
    counts = {name: sum(bool(re.search(rf"\b{name}{word}", x)) for x in lines) for name in names}
    return {name: n for name, n in counts.items() if n}


def sass(compiled):
    return _cuobjdump(compiled.asm["cubin"], "--dump-sass").splitlines()


def loop_over_video(compiled, target):
    """The lines of the first of the innermost loops with matrix products.

    A jump back to code in a loop
    from behind the kernel's end (waiting for a copy goes on there) makes no loop.
    """
    if target.backend == "hip":
        lines = compiled.asm["amdgcn"].splitlines()
        place, jump = r"^\.LBB(\d+_\d+):", r"s_c?branch\S* \.LBB(\d+_\d+)"
    else:
        lines = sass(compiled)
        place, jump = r"^\s+/\*0*([0-9a-f]+)\*/", r"\bBRA.*?0x([0-9a-f]+)"
    places = {m[1]: i for i, text in enumerate(lines) if (m := re.search(place, text))}
    loops = []
    for end, text in enumerate(lines):
        found = re.search(jump, text)
        start = places[found[1]] if found else end
        if start < end and any(re.search(PRODUCTS, line) for line in lines[start:end]):
            loops.append((start, end))
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    return lines[slice(*min(inner))] if inner else []


def _cuobjdump(cubin, option="--dump-resource-usage"):
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    path = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}  # it calls its neighbour
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [folder / "cuobjdump", option, file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=path)
    return done.stdout


def offset_types(compiled):
    """The integer types that are added to pointers anywhere in the kernel."""
    text = compiled.asm["ttir" if "ttir" in compiled.asm else "ttgir"]  # Gluon begins there
    found = re.findall(r"tt\.addptr .* : .*, (?:tensor<[\dx]+x)?(i\d+)", text)
    return sorted(set(found))


def rows_of(arch, D, *, dtype="bfloat16", masked=False, run=8, tokens=36864, grid=None):
    """One row for each kernel that forward and backward launch."""
    target = TARGETS[arch]
    pattern = SkipPattern(8, run)
    if grid is not None:
        *sides, ratio = grid
        pattern = GridPattern.single(sides, ratio)
        tokens = pattern.tokens
    given = pattern, tokens, D, getattr(torch, dtype), masked
    for kernel, arguments, options in launches(arch, *given):
        compiled = compile_launch(kernel, arguments, options, target)
        row = {"kernel": kernel.__name__, "arch": arch, "D": D, "masked": masked}
        row |= resources(compiled, target) | {"offsets": offset_types(compiled)}
        row |= {"loop": main_loop(compiled, target), "turn": turn(compiled, target, options)}
        yield row | ({"roles": roles(compiled, target)} if kernel.is_gluon() else {})


def write_table(path, architectures):
    """Put the rows of the installed Triton into the table, a line each."""
    table = json.loads(path.read_text()) if path.exists() else {}
    kept = [x for x in table.get(triton.__version__, ()) if x["arch"] not in architectures]
    new = [
        row
        for arch in architectures
        for D in TABLE_DIMS
        for masked in (False, True)
        for row in rows_of(arch, D, masked=masked)
    ]
    order = list(TARGETS)
    table[triton.__version__] = sorted(kept + new, key=lambda row: order.index(row["arch"]))
    parts = (
        f"{json.dumps(release)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
        for release, rows in sorted(table.items())
    )
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=(*TARGETS, "all"))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--dims", type=int, nargs="+", default=TABLE_DIMS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--masked", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--run", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=36864)
    parser.add_argument("--grid", type=int, nargs=4, help="frames, rows, columns and ratio")
    args = parser.parse_args()
    if args.write:
        write_table(args.write, TARGETS if args.arch == "all" else [args.arch])
        return
    for D in args.dims:
        for masked in map(bool, args.masked):
            how = {name: getattr(args, name) for name in ("dtype", "run", "tokens", "grid")}
            for row in rows_of(args.arch, D, masked=masked, **how):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
