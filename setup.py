"""Where the packages lie: `models/` and `bench/` install as skiparse.models and skiparse.bench.

The wheel is pure Python, unless SKIPARSE_BUILD_ASCEND=1 asks for the AscendC extension too: the
kernels, by CANN's compiler, and their torch operators, against the torch and torch_npu installed.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def ascend():
    """What `setup` needs to build the AscendC extension; SystemExit says what is missing."""
    cann = os.environ.get("ASCEND_HOME_PATH", "")
    places = [Path(cann, "bin"), Path(cann, "compiler", "ccec_compiler", "bin")]
    missing = []
    if not Path(cann).is_dir() or not cann:
        missing.append(
            "ASCEND_HOME_PATH, which names CANN's folder: install the CANN toolkit 9.1 or later "
            "(https://www.hiascend.com/cann) and `source .../set_env.sh`"
        )
    elif not any((place / "bisheng").exists() for place in places):
        missing.append(f"CANN's compiler bisheng in {cann}: install the CANN toolkit 9.1 or later")
    for name, package in (("torch", "torch"), ("torch_npu", "torch_npu")):
        if importlib.util.find_spec(name) is None:
            missing.append(
                f"{package}, seen by this build: pip install {package}, then pip install with "
                "--no-build-isolation"
            )
    if shutil.which("cmake") is None:
        missing.append("cmake: pip install cmake")
    if missing:
        raise SystemExit(
            "SKIPARSE_BUILD_ASCEND=1 asks for the AscendC extension, which needs\n  "
            + "\n  ".join(missing)
            + "\nUnset the variable to install skiparse in pure Python."
        )

    # Not imported: without CANN's libraries it could not be, and its folder is enough.
    npu = Path(importlib.util.find_spec("torch_npu").submodule_search_locations[0])
    kernels = ROOT / "build" / "ascend"
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Builds the library of the kernels first, which the torch operators link to."""

        def build_extensions(self):
            shutil.rmtree(kernels, ignore_errors=True)  # another CANN's, perhaps
            subprocess.run(["cmake", "-S", ROOT / "csrc", "-B", kernels], check=True)
            subprocess.run(["cmake", "--build", kernels], check=True)
            super().build_extensions()
            self.copy_kernels(Path(self.get_ext_fullpath(self.extensions[0].name)).parent)

        def copy_extensions_to_source(self):  # of an editable install
            super().copy_extensions_to_source()
            self.copy_kernels(ROOT / "skiparse" / "backends")

        def copy_kernels(self, folder):
            shutil.copy(kernels / "libskiparse_ascend.so", folder)

    shim = CppExtension(
        "skiparse.backends._ascendc",
        ["csrc/host/shim.cpp"],
        depends=[str(header) for header in ROOT.glob("csrc/**/*.h")],
        include_dirs=[str(npu / "include"), str(npu / "include/third_party/acl/inc")],
        library_dirs=[str(npu / "lib"), "build/ascend"],
        libraries=["torch_npu", "skiparse_ascend"],
        # CANN's libraries, which torch_npu's needs, are found when torch_npu is loaded.
        extra_link_args=["-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN"],
    )
    return {"ext_modules": [shim], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


setup(
    packages=[
        "skiparse",
        "skiparse.backends",
        "skiparse.backends.ascendc",
        "skiparse.backends.triton",
        "skiparse.models",
        "skiparse.models.data",
        "skiparse.models.suv",
        "skiparse.models.train",
        "skiparse.models.wfvae",
        "skiparse.bench",
        "skiparse.bench.gpu",
    ],
    package_dir={
        "skiparse": "skiparse",
        "skiparse.models": "models",
        "skiparse.bench": "bench",
    },
    package_data={"skiparse": ["py.typed", "orders/*.json"], "skiparse.models.train": ["*.yaml"]},
    **(ascend() if os.environ.get("SKIPARSE_BUILD_ASCEND") == "1" else {}),
)
