"""What ``skiparse info`` says: versions, devices, and which backends can run here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Info:
    """Versions, devices, and which backends can run here."""

    extra: ClassVar[str] = "dev"

    def run(self) -> None:
        """Print them."""
        import importlib
        import importlib.util
        import platform

        import torch

        import skiparse
        from skiparse.registry import BACKENDS

        print(f"skiparse {skiparse.__version__}, Python {platform.python_version()}")
        for name in ("torch", "triton", "numpy", "einops"):
            there = importlib.util.find_spec(name) is not None
            version = importlib.import_module(name).__version__ if there else "not installed"
            print(f"{name} {version}")
        threads, kind = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
        print(f"\ncpu: {threads} threads, {kind}")
        for index in range(torch.cuda.device_count()):
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, capability {capability}")
        if not torch.cuda.is_available():
            print("cuda: none")
        reasons = skiparse.list_backends()
        print("\nbackends, in the order in which a call without a name tries them:")
        width = max(len(row.name) for row in BACKENDS)
        for row in BACKENDS:
            reason = reasons[row.name]
            chosen_on = ", ".join(row.chosen_on)
            chosen = f"by itself on {chosen_on}" if row.chosen_on else "by name alone"
            able = "can run" if reason is None else f"cannot run: {reason}"
            print(f"  {row.name:{width}} {able}")
            print(f"  {'':{width}} {row.what}; {chosen}")
            print(f"  {'':{width}} verified: {row.verified}")
