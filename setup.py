"""Where the packages lie: `models/` and `bench/` install as skiparse.models and skiparse.bench.

The wheel is pure Python, unless SKIPARSE_BUILD_ASCEND=1 asks for the AscendC extension too: the
kernels, by CANN's compiler, and their torch operators, against the torch and torch_npu installed.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDER = ROOT / "build" / "ascend"


class Fresh(build_py):
    """The modules without what an earlier build left: files that have since moved."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def ascend():
    """What `setup` needs to build the AscendC extension; SystemExit says what is missing."""
    sys.path.insert(0, str(ROOT))
    from csrc import build

    class Build(build_ext):
        """Both libraries by CMake: the kernels', and the torch operators that link to it."""

        def build_extension(self, extension):
            shutil.rmtree(FOLDER, ignore_errors=True)  # another CANN's, perhaps
            try:
                print(build.build(FOLDER, "all", SKIPARSE_ASCEND=True, SKIPARSE_TORCH=True))
            except build.BuildError as error:
                raise refused(error) from None
            build.install(FOLDER, Path(self.build_lib))

        def copy_extensions_to_source(self):  # of an editable install
            build.install(FOLDER, ROOT)

    def refused(reason):
        return SystemExit(
            "SKIPARSE_BUILD_ASCEND=1 asks for the AscendC extension, which cannot be built.\n"
            f"{reason}\nUnset the variable to install skiparse in pure Python."
        )

    reason = build.why_not(modules=False)
    if reason is not None:
        raise refused(f"{reason}, then pip install with --no-build-isolation")
    extension = Extension("skiparse.backends._ascendc", sources=[])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build, "build_py": Fresh}}


PURE = {"cmdclass": {"build_py": Fresh}}

setup(
    packages=[
        "skiparse",
        "skiparse.backends",
        "skiparse.backends.ascendc",
        "skiparse.backends.triton",
        "skiparse.models",
        "skiparse.models.data",
        "skiparse.models.retrofit",
        "skiparse.models.suv",
        "skiparse.models.train",
        "skiparse.models.wan",
        "skiparse.models.wfvae",
        "skiparse.bench",
        "skiparse.bench.demo",
        "skiparse.bench.experiments",
        "skiparse.bench.gpu",
        "skiparse.bench.models",
        "skiparse.bench.op",
    ],
    package_dir={
        "skiparse": "skiparse",
        "skiparse.models": "models",
        "skiparse.bench": "bench",
    },
    exclude_package_data={"": ["*.md"]},  # the books are in the source archive
    package_data={
        "skiparse": ["py.typed", "orders/*.json"],
        "skiparse.models.data": ["*.yaml"],
        "skiparse.models.train": ["*.yaml"],
    },
    **(ascend() if os.environ.get("SKIPARSE_BUILD_ASCEND") == "1" else PURE),
)
