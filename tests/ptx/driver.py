"""Triton's own host path without a GPU: specialised, compiled and launched on a recording libcuda.

What the launchers ask CUDA for arrives here: kernels with their PTX, tensor maps, which are checked
for legality as they are made, and launches with the bytes of their parameters. ptxas does not run.
"""

import ctypes
import hashlib
import struct
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from csrc import build
from ptx.memory import Fault
from ptx.program import parse
from ptx.schedule import Schedule
from ptx.tma import MAGIC, TensorMap

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "build" / "recorder" / "libcuda.so.1"
LAUNCHED = ctypes.CFUNCTYPE(
    None,
    ctypes.c_uint64,
    *[ctypes.c_uint32] * 3,
    ctypes.POINTER(ctypes.c_void_p),
)
DESCRIBED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_uint64,
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(ctypes.c_uint32)] * 2,
    *[ctypes.c_int] * 2,
)
REFUSED = 1  # CUDA_ERROR_INVALID_VALUE


class Driver(nvidia.CudaDriver):
    """Triton's driver of a GPU of compute capability ``capability``, 80 or 90."""

    def __init__(self, capability):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: divmod(capability, 10)


def without_ptxas(*given):
    """A hook of Triton's: PTX is where compilation ends. Without arguments, its part of the key."""
    name = "PTX only"
    if not given:
        return name, hashlib.sha256(name.encode()).hexdigest()
    _, stages, *_ = given
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


@dataclass
class Kernel:
    """What Triton compiled; ``schedules`` are the programs that were made of it, by PTX."""

    name: str
    ptx: str
    schedules: dict = field(default_factory=dict)

    def schedule(self, ptx=None):
        """The program ready to run, of its own PTX or of one that was edited."""
        ptx = self.ptx if ptx is None else ptx
        if ptx not in self.schedules:
            self.schedules[ptx] = Schedule(parse(ptx))
        return self.schedules[ptx]


class Recorder:
    """The libcuda of this process. Make one, once; ``on_launch``, if any, gets each launch.

    A launch is ``(kernel, grid, threads, shared, [parameter's bytes])``. What ``on_launch`` raises
    is raised by ``check``, because no exception passes through C.
    """

    def __init__(self, capability):
        build.build(LIBRARY.parent, "recorder", SKIPARSE_RECORDER=True)
        knobs.nvidia.libcuda_path = str(LIBRARY.parent)
        knobs.runtime.add_stages_inspection_hook = without_ptxas
        knobs.runtime.kernel_load_end_hook.add(self._load)
        self.library = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
        self.kernels, self.tensor_maps, self.errors = {}, [], []
        self.on_launch = None
        self._callbacks = LAUNCHED(self._launched), DESCRIBED(self._described)
        self.library.record(*self._callbacks)
        triton.runtime.driver.set_active(Driver(capability))

    def _load(self, module, function, name, files, hash):
        (path,) = (Path(file) for file in files.values() if str(file).endswith(".ptx"))
        self.kernels[function] = Kernel(name, path.read_text())

    def _launched(self, function, grid, threads, shared, parameters):
        if self.errors or self.on_launch is None:
            return
        try:
            kernel = self.kernels[function]
            sizes = [p.size for p in kernel.schedule().program.parameters]
            values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes)]
            self.on_launch(kernel, grid, threads, shared, values)
        except BaseException as error:
            self.errors.append(error)

    def _described(self, out, kind, rank, address, dims, strides, box, steps, interleave, swizzle):
        made = TensorMap(
            kind,
            address,
            tuple(dims[:rank]),
            tuple(strides[: rank - 1]),
            tuple(box[:rank]),
            tuple(steps[:rank]),
            interleave,
            swizzle,
        )
        if made.illegal():
            self.errors.append(Fault(f"{made} is refused: {'; '.join(made.illegal())}"))
            return REFUSED
        ctypes.memset(out, 0, 128)
        ctypes.memmove(out, struct.pack("<QQ", MAGIC, len(self.tensor_maps)), 16)
        self.tensor_maps.append(made)
        return 0

    def check(self):
        """Raise what went wrong in a launch."""
        if self.errors:
            error, self.errors[:] = self.errors[0], []
            raise error
