"""The ``skiparse`` command: what is here, how fast it is, and a demonstration on real video."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from skiparse.models.data.video import Limits

_EXPERIMENTS = ("clipping", "sparsity", "wavelets")
_BACKENDS, _AGAINST = "sdpa,triton", "dense,original,flex,natten"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the status: 2 for arguments that make no sense, 130 for Ctrl-C."""
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
    bench.add_argument("--backends", default=_BACKENDS, help="comma-separated (%(default)s)")
    bench.add_argument("--against", default=_AGAINST, help="comma-separated (%(default)s)")
    bench.add_argument(
        "--results",
        help="append rows to this JSON-lines file, '' for none; default: bench/results.jsonl "
        "where that exists, as in a checkout",
    )
    bench.add_argument(
        "--block", action="store_true", help="instead, the parts of one SUV block: time and memory"
    )
    bench.add_argument(
        "--vae", action="store_true", help="instead, WF-VAE: encode, decode, time and memory"
    )
    bench.add_argument(
        "--cache", action="store_true", help="instead, training from cached features: what it saves"
    )
    bench.set_defaults(run=_bench, extra="bench")

    tune = commands.add_parser(
        "tune", help="measure which backend is fastest on this GPU, for backend='auto'"
    )
    tune.add_argument("--device", help='such as "cuda:1"; default: cuda')
    tune.add_argument("--dtype", help="default: bfloat16 on cuda")
    tune.add_argument("--rounds", type=int, default=7, help="repetitions (%(default)s)")
    tune.set_defaults(run=_tune, extra="bench")

    demo = commands.add_parser(
        "demo", help="attention on a real clip, then an autoencoder and a model trained on it"
    )
    demo.add_argument("--out", default="demo_out", help="folder for report.html (%(default)s)")
    demo.add_argument("--clip", help="only attention, on this video file")
    demo.set_defaults(run=_demo, extra="demo")

    overfit = commands.add_parser(
        "overfit", help="a tiny SUV, dense and sparse, learns scenes of a real clip by heart"
    )
    overfit.add_argument("--out", default="demo_out", help="folder for overfit.png (%(default)s)")
    overfit.add_argument("--steps", type=int, help="of the optimiser; default: 400")
    overfit.set_defaults(run=_overfit, extra="demo,models")

    experiment = commands.add_parser(
        "experiment", help="a comparison on the real clip, as it comes out: a table and a picture"
    )
    experiment.add_argument("name", choices=_EXPERIMENTS, help=", ".join(_EXPERIMENTS))
    experiment.add_argument("--out", default="demo_out", help="folder for pictures (%(default)s)")
    experiment.set_defaults(run=_experiment, extra="demo")

    convert = commands.add_parser("convert", help="turn released weights into safetensors")
    kinds = convert.add_subparsers(required=True, metavar="MODEL")
    suv = kinds.add_parser("suv", help="the denoiser: a .pt file, or one for each parallel rank")
    suv.add_argument("src", nargs="+", metavar="IN", help="a file, that of each rank, or a folder")
    suv.add_argument("dst", metavar="OUT", help="the folder to make; it must not exist")
    suv.add_argument("--sparsity", help="such as 1,2,4,8,4,2,1; default: that of the preset")
    vae = kinds.add_parser(
        "vae", help="WF-VAE, the video autoencoder: a .ckpt or .safetensors file"
    )
    vae.add_argument("src", metavar="IN", help="a file, or a folder of safetensors")
    vae.add_argument("dst", metavar="OUT", help="the folder to make; it must not exist")
    for each in (suv, vae):
        each.add_argument("--key", help="where IN keeps the weights; default: averaged ones if any")
        each.add_argument("--dtype", help="of the weights written; default: that of IN")
    suv.set_defaults(run=_convert_suv, extra="models")
    vae.set_defaults(run=_convert_vae, extra="models")

    sample = commands.add_parser("sample", help="make videos from prompts with a trained model")
    sample.add_argument("--model", required=True, help="a folder that SUVPipeline saved")
    prompts = sample.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="what to show")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    sample.add_argument(
        "--out",
        help="the .mp4 to write, a .png for one frame; with --prompts a folder of them. Side-car "
        "files beside them record how they were made",
    )
    sample.add_argument("--vbench", metavar="DIR", help="lay videos out as VBench expects")
    sample.add_argument("--samples", type=int, help="videos a prompt with --vbench; default: 5")
    sample.add_argument(
        "--list", action="store_true", help="print what is missing from --vbench DIR and stop"
    )
    sample.add_argument("--negative", help="what to stay away from; default: a list of flaws")
    sample.add_argument(
        "--seed", type=int, default=0, help="of a prompt's first video (%(default)s)"
    )
    for name, number, what in (
        ("--height", 576, "pixels"),
        ("--width", 1024, "pixels"),
        ("--frames", 121, "8n + 1; 1 for a picture"),
        ("--steps", 50, "model calls, or pairs of them with guidance"),
        ("--fps", 24, "frames per second"),
        ("--crf", 23, "x264's quality, 0 best to 51"),
    ):
        sample.add_argument(name, type=int, default=number, help=f"{what} (%(default)s)")
    sample.add_argument("--guidance", type=float, default=7.0, help="1 is none (%(default)s)")
    sample.add_argument(
        "--rescale", type=float, default=0.7, help="more against garish colours (%(default)s)"
    )
    sample.add_argument("--shift", type=float, default=7.0, help="of the noise (%(default)s)")
    sample.add_argument("--schedule", default="linear", help="or linear_quadratic (%(default)s)")
    sample.add_argument("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    sample.add_argument("--dtype", help="default: bfloat16 on cuda, float32 on cpu")
    sample.add_argument(
        "--sequential-cfg", action="store_true", help="less memory: one prompt after the other"
    )
    sample.add_argument(
        "--offload", action="store_true", help="keep on the GPU only the model that runs"
    )
    sample.set_defaults(run=_sample, extra="models,video")

    train = commands.add_parser(
        "train",
        help="train a model through the stages of a config",
        description="Train a model through the stages of a config; the same command again "
        "continues the run. Every setting of the file can be changed behind it: --seed 1, "
        "--stages.V1.steps 100; --print_config prints them all. Under torchrun, several processes "
        "share the work.",
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or v1.5, mini or wfvae")
    train.add_argument("settings", nargs=argparse.REMAINDER, metavar="--SETTING VALUE")
    train.set_defaults(run=_train, extra="train")

    export = commands.add_parser(
        "export", help="make a model of a run: for `skiparse sample`, or a WFVAE"
    )
    export.add_argument("run_folder", metavar="RUN", help="the out of a run")
    export.add_argument("out", metavar="OUT", help="the folder to make; it must not exist")
    export.add_argument("--vae", metavar="DIR", help="a folder that WFVAE saved; for a denoiser")
    export.add_argument("--text", metavar="DIR", help="with the text encoders; for a denoiser")
    export.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="averaged or last (%(default)s)"
    )
    export.add_argument(
        "--other-encoders",
        action="store_true",
        help="take a VAE or text encoders that are not those of the run",
    )
    export.set_defaults(run=_export, extra="train")

    data = commands.add_parser("data", help="what a data set consists of, before a run")
    looks = data.add_subparsers(required=True, metavar="ACTION")
    look = looks.add_parser("check", help="how many clips would be used, and why others would not")
    look.add_argument("source", metavar="FOLDER", help="of clips, or annotations, or a data.txt")
    look.add_argument("--config", help="also by the rule of a stage of it; as of `skiparse train`")
    look.add_argument("--stage", help="of --config; default: its last")
    look.add_argument(
        "--out", default="data_check.json", metavar="FILE", help="what is dropped (%(default)s)"
    )
    _add_limits(look)
    look.set_defaults(run=_data_check, extra="train")

    cache = commands.add_parser("cache", help="latents and text embeddings, computed once")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="encode what a stage of a config trains on")
    build.add_argument("config", metavar="CONFIG", help="as of `skiparse train`")
    build.add_argument("stage", metavar="STAGE", help="whose source and rule to take")
    build.add_argument("out", metavar="OUT", help="the folder; the same command again continues it")
    build.add_argument("--store", default="float32", help="or bfloat16, float16 (%(default)s)")
    build.add_argument("--workers", type=int, default=0, help="processes that read (%(default)s)")
    build.add_argument("settings", nargs=argparse.REMAINDER, metavar="--SETTING VALUE")
    build.set_defaults(run=_cache_build, extra="train")
    verify = actions.add_parser("verify", help="compare every checksum")
    verify.add_argument("folder", metavar="FOLDER")
    verify.add_argument(
        "--repair", action="store_true", help="drop what is damaged; build makes that again"
    )
    verify.add_argument(
        "--full", action="store_true", help="compare all of each clip, not its size, time and ends"
    )
    verify.set_defaults(run=_cache_verify, extra="train")

    train_vae = commands.add_parser("train-vae", help="train a WF-VAE on a folder of clips")
    train_vae.add_argument("folder", help="with video files of some seconds, at any depth")
    train_vae.add_argument(
        "--out", required=True, help="folder of the run; the same command again continues it"
    )
    origin = train_vae.add_mutually_exclusive_group()
    origin.add_argument("--model", default="v1.5-M", help="a size, from random (%(default)s)")
    origin.add_argument("--init", metavar="DIR", help="a trained one, as of the stage before")
    train_vae.add_argument("--stage", default="I", help="I, II or III, as published (%(default)s)")
    train_vae.add_argument("--lpips", metavar="FILE", help="its weights, as safetensors")
    train_vae.add_argument("--size", metavar="HxW", help="of a clip; default: 256x256")
    train_vae.add_argument("--reduction", help="sum or mean; default: sum, as published")
    for name, kind, what in (
        ("--steps", int, "in all; default, as below: that of the stage"),
        ("--frames", int, "of a clip, 8n + 1"),
        ("--every", int, "take every so many frames"),
        ("--batch", int, "clips in a step"),
        ("--learning-rate", float, "of both networks"),
        ("--lpips-weight", float, "of the perceptual term"),
        ("--kl-weight", float, "of the divergence of latents from normal ones"),
        ("--wavelet-weight", float, "of the wavelet coefficients"),
        ("--adversarial-weight", float, "0 for no discriminator"),
        ("--discriminator-start", int, "step before which there is none"),
        ("--discriminator-width", int, "of its first layer"),
        ("--seed", int, "of everything random"),
    ):
        train_vae.add_argument(name, type=kind, metavar="N", help=what)
    train_vae.add_argument(
        "--save-every", type=int, default=1000, metavar="N", help="steps (%(default)s)"
    )
    train_vae.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that read (%(default)s)"
    )
    train_vae.add_argument("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    train_vae.add_argument("--dtype", help="default: bfloat16 on cuda, float32 on cpu")
    _add_limits(train_vae)
    train_vae.set_defaults(run=_train_vae, extra="train")

    evaluate = commands.add_parser("eval-vae", help="code clips and back, and measure what is lost")
    evaluate.add_argument("--model", required=True, help="a folder that WFVAE saved")
    evaluate.add_argument("clips", nargs="+", metavar="CLIP", help="a video file")
    evaluate.add_argument("--out", required=True, help="folder for evaluation.json and pictures")
    evaluate.add_argument("--frames", type=int, default=33, help="8n + 1 a clip (%(default)s)")
    evaluate.add_argument("--height", type=int, default=256, help="pixels (%(default)s)")
    evaluate.add_argument("--width", type=int, default=256, help="pixels (%(default)s)")
    evaluate.add_argument("--fps", type=float, help="frames per second; default: those of a clip")
    evaluate.add_argument("--tile", type=int, help="code tiles of so many pixels; default: whole")
    evaluate.add_argument("--overlap", type=int, help="pixels that tiles share; with --tile")
    evaluate.add_argument(
        "--lpips", metavar="FILE", help="the network of LPIPS: safetensors (VGG) or TorchScript"
    )
    evaluate.add_argument(
        "--fvd",
        metavar="FILE",
        help="the feature network of FVD, TorchScript; run none you distrust",
    )
    evaluate.add_argument("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    evaluate.add_argument("--dtype", help="default: bfloat16 on cuda, float32 on cpu")
    _add_limits(evaluate)
    evaluate.set_defaults(run=_eval_vae, extra="models,video")

    stats = commands.add_parser(
        "vae-stats", help="give a WF-VAE the shift and scale of its latents"
    )
    stats.add_argument("model", metavar="MODEL", help="a folder that WFVAE saved")
    stats.add_argument("clips", metavar="CLIPS", help="a folder with video files")
    stats.add_argument("out", metavar="OUT", help="the folder to make; it must not exist")
    stats.add_argument("--frames", type=int, default=25, help="of a clip, 8n + 1 (%(default)s)")
    stats.add_argument("--size", metavar="HxW", default="256x256", help="of a clip (%(default)s)")
    stats.add_argument("--every", type=int, default=1, help="take every so many frames")
    stats.add_argument("--cuts", type=int, help="how many clips; default: one of each file")
    stats.add_argument("--seed", type=int, default=0, help="of the cuts (%(default)s)")
    stats.add_argument("--workers", type=int, default=2, help="processes that read (%(default)s)")
    stats.add_argument("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    stats.add_argument("--dtype", help="default: bfloat16 on cuda, float32 on cpu")
    _add_limits(stats)
    stats.set_defaults(run=_vae_stats, extra="train")

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
    except (FloatingPointError, OSError) as error:  # what went wrong on the way
        print(f"skiparse: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("skiparse: interrupted", file=sys.stderr)
        return 130
    return 0


_LIMITS = (
    ("max_pixels", int, "of one frame"),
    ("max_frames", int, "to decode for one clip"),
    ("max_pixel_frames", int, "in all of these together"),
    ("max_hold", float, "seconds from one frame to the next"),
)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    for name, kind, what in _LIMITS:
        parser.add_argument(f"--limits.{name}", type=kind, metavar="N", help=f"at most: {what}")


def _limits(options: argparse.Namespace) -> Limits:
    """As given on the command line, by the names that they have in a config."""
    from skiparse.models.data.video import Limits

    given = {name: getattr(options, f"limits.{name}") for name, _, _ in _LIMITS}
    return Limits(**{name: value for name, value in given.items() if value is not None})


def _info(options: argparse.Namespace) -> None:
    import importlib
    import importlib.util
    import platform

    import torch

    import skiparse
    from skiparse.registry import BACKENDS

    print(f"skiparse {skiparse.__version__}, Python {platform.python_version()}")
    for name in ("torch", "triton", "numpy", "einops"):
        there = importlib.util.find_spec(name) is not None
        print(f"{name} {importlib.import_module(name).__version__ if there else 'not installed'}")
    print(f"\ncpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
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
        chosen = f"by itself on {', '.join(row.chosen_on)}" if row.chosen_on else "by name alone"
        print(f"  {row.name:{width}} {'can run' if reason is None else 'cannot run: ' + reason}")
        print(f"  {'':{width}} {row.what}; {chosen}")
        print(f"  {'':{width}} verified: {row.verified}")


def _device_and_dtype(options: argparse.Namespace) -> tuple[str, torch.dtype]:
    from skiparse.models import devices

    device = str(devices.chosen(options.device, setting="--device "))
    return device, _dtype(options.dtype or ("bfloat16" if device != "cpu" else "float32"))


def _dtype(name: str) -> torch.dtype:
    import torch

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for dtype in dtypes:
        if name == str(dtype).removeprefix("torch."):
            return dtype
    raise ValueError(f"--dtype {name}: give float32, bfloat16, float16 or float64")


def _bench(options: argparse.Namespace) -> None:
    from pathlib import Path

    from skiparse import registry
    from skiparse.bench.op import cases, run

    if options.list:
        print("\n".join(cases.CASES))
        return
    device, dtype = _device_and_dtype(options)
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: give at least 1")
    if options.block:
        _bench_block(options, device, dtype)
        return
    if options.vae:
        _bench_vae(options, device, dtype)
        return
    if options.cache:
        _bench_cache(options, device, dtype)
        return
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


def _bench_block(options: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
    from skiparse.bench.models import block

    results = _rows_of("block", options)
    block.run(device=device, dtype=dtype, rounds=options.rounds, results=results)


def _bench_vae(options: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
    from skiparse.bench.models import vae

    results = _rows_of("vae", options)
    vae.run(device=device, dtype=dtype, rounds=options.rounds, results=results)


def _bench_cache(options: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
    import torch

    from skiparse.bench.models import cache

    results = _rows_of("cache", options)
    if device != "cpu" or dtype != torch.float32:
        raise ValueError("--cache measures on the CPU in float32; add --device cpu")
    cache.run(rounds=options.rounds, results=results)


def _rows_of(name: str, options: argparse.Namespace) -> Path | None:
    """The file that gets the rows of a bench that is not one of attention cases."""
    from pathlib import Path

    if options.cases or (options.backends, options.against) != (_BACKENDS, _AGAINST):
        raise ValueError(f"--{name} takes no cases, --backends or --against; leave them out")
    if options.results is not None:
        return Path(options.results) if options.results else None
    checkout = Path("bench/results.jsonl").exists()
    return Path(f"bench/{name}.jsonl") if checkout else None


def _tune(options: argparse.Namespace) -> None:
    from skiparse.bench.op import tune

    device, dtype = _device_and_dtype(options)
    if device == "cpu":
        raise ValueError("tune is for a GPU, and torch finds none here; a CPU has its order")
    print(tune.tune(device=device, dtype=dtype, rounds=options.rounds))


def _demo(options: argparse.Namespace) -> None:
    from skiparse.bench.demo import attention, tour

    if options.clip is not None:
        attention.run(options.out, options.clip)
    else:
        tour.run(options.out)


def _overfit(options: argparse.Namespace) -> None:
    from skiparse.bench.experiments import overfit

    overfit.run(options.out, steps=overfit.STEPS if options.steps is None else options.steps)


def _experiment(options: argparse.Namespace) -> None:
    from skiparse.bench.experiments import clipping, reconstruct, sparsity

    if options.name == "clipping":
        clipping.run(options.out)
    elif options.name == "sparsity":
        sparsity.run(options.out)
    else:
        reconstruct.ablate(options.out)


def _convert_suv(options: argparse.Namespace) -> None:
    from skiparse.models.suv.convert import convert_file

    sparsity = None if options.sparsity is None else options.sparsity.split(",")
    if sparsity is not None and not all(k.isdecimal() for k in sparsity):
        raise ValueError(f"--sparsity {options.sparsity}: give whole numbers such as 1,2,4,2,1")
    report = convert_file(
        options.src if len(options.src) > 1 else options.src[0],
        options.dst,
        sparsity=None if sparsity is None else [int(k) for k in sparsity],
        key=options.key,
        dtype=_dtype(options.dtype) if options.dtype else None,
        progress=True,
    )
    where = _where(report.found, report.others)
    print(f"{options.dst}: {report.names} names, {report.ranks} rank(s), weights found {where}")
    print(f"left out, without effect: {', '.join(report.dropped) or 'nothing'}")


def _where(found: str, others: Sequence[str]) -> str:
    """Under which key weights were, and under which there are some that were not taken."""
    where = f"under {found}" if found else "at the top"
    keys = ", ".join(f"--key {other}" if other else "--key ''" for other in others)
    return f"{where}; not taken, but there: {keys}" if others else where


def _convert_vae(options: argparse.Namespace) -> None:
    from skiparse.models.wfvae.convert import convert_file

    report = convert_file(
        options.src,
        options.dst,
        key=options.key,
        dtype=_dtype(options.dtype) if options.dtype else None,
        progress=True,
    )
    where = _where(report.found, report.others)
    latents = "none, so latents stay as they are"
    if report.config["shift"] is not None:
        latents = "of the weights" if "shift" in report.dropped else "of the preset of this size"
    print(f"{options.dst}: {report.names} names, weights found {where}")
    print(f"Haar gain {report.config['haar_gain'] or 'exact'}; shift and scale: {latents}")
    print(f"left out, for the config holds it: {', '.join(report.dropped) or 'nothing'}")


def _sample(options: argparse.Namespace) -> None:
    from skiparse.models import sample

    if options.list:
        sample.plan(options)
    else:
        sample.run(options, *_device_and_dtype(options))


def _train(options: argparse.Namespace) -> None:
    from skiparse.models.train.config import load
    from skiparse.models.train.loop import train

    print(train(load(options.config, options.settings)))


def _data_check(options: argparse.Namespace) -> None:
    from skiparse.models.data.atomic import check_writable
    from skiparse.models.data.buckets import assign, without_minority
    from skiparse.models.data.manifest import Manifest
    from skiparse.models.train.config import Stage, stages_of

    if options.stage is not None and options.config is None:
        raise ValueError("--stage is of a --config; give that too")
    stage = None
    if options.config is not None:
        stages = stages_of(options.config)
        name = options.stage or list(stages)[-1]
        if name not in stages:
            raise ValueError(f"{name} is no stage; take one of {', '.join(stages)}")
        stage = stages[name]
        if not isinstance(stage, Stage):
            raise ValueError(
                f"{options.config} is of no denoiser: its stages have no rule to check"
            )
    check_writable(options.out)
    manifest = Manifest.open(options.source, limits=_limits(options))
    buckets = None
    if stage is not None:
        found = assign(manifest, stage.rule, 0)
        buckets = without_minority(found, stage.global_batch, stage.rule)
    report = manifest.report(buckets)
    for reason, names in report.examples.items():
        print(f"{report.dropped[reason]} {reason}:")
        print(*(f"  {name}" for name in names[:3]), sep="\n")
    videos = manifest.is_video > 0
    print(f"{videos.sum()} videos and {(~videos).sum()} images", end="")
    for what, values in (
        ("high", manifest.height),
        ("wide", manifest.width),
        ("frames", manifest.frames[videos]),
        ("frames a second", manifest.fps[videos].round(3)),
    ):
        if len(values):
            print(f", {values.min():g} to {values.max():g} {what}", end="")
    print()
    if report.more["estimated"]:
        print(f"{report.more['estimated']} are large, and their frames are estimates until read")
    if buckets is not None:
        for shape, count in zip(buckets.shapes, buckets.counts, strict=True):
            print(f"{count} of {'x'.join(map(str, shape))}")
    report.write(options.out)
    print(report.line)
    print(f"what is dropped, by name: {options.out}")


def _cache_build(options: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from skiparse.models.data import cache
    from skiparse.models.data.manifest import Manifest
    from skiparse.models.train.config import load
    from skiparse.models.train.recipe import Recipe, recipe_of

    config = load(options.config, options.settings)
    recipe = recipe_of(config.recipe)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{options.config} is of no denoiser; a cache is of what one learns from")
    if options.stage not in config.stages:
        raise ValueError(f"{options.stage} is no stage; take one of {', '.join(config.stages)}")
    stage = config.stages[options.stage]
    source = stage.source or config.source
    if source is None:
        raise ValueError("a cache needs a source; give --source")
    device, _ = _device_and_dtype(argparse.Namespace(device=config.device, dtype=None))
    encoders = recipe.coder(config, torch.device(device))
    out = Path(options.out)
    manifest = Manifest.open(source, index=out / "manifest", limits=config.limits)
    cache.build(
        out,
        manifest,
        stage.rule,
        encoders,
        seed=config.seed,
        dtype=options.store,
        limits=config.limits,
        workers=options.workers,
    )
    print(out)


def _cache_verify(options: argparse.Namespace) -> None:
    from skiparse.models.data import cache

    found = cache.verify(options.folder, repair=options.repair, full=options.full)
    for damage in found:
        print(f"{damage.file}: {damage.reason}; lost: {', '.join(damage.keys) or 'unknown'}")
    if found and not options.repair:
        raise ValueError(f"{options.folder} is damaged; --repair, and build it again")
    print(f"{options.folder}: {len(found)} damaged files {'dropped' if found else ''}".rstrip())


def _export(options: argparse.Namespace) -> None:
    from pathlib import Path

    from skiparse.models.train.export import export

    made = export(
        Path(options.run_folder),
        Path(options.out),
        vae=options.vae,
        text=options.text,
        weights=options.weights,
        other_encoders=options.other_encoders,
    )
    print(made)


def _train_vae(options: argparse.Namespace) -> None:
    from skiparse.models.wfvae.train import train_folder

    names = (
        "frames", "every", "batch", "learning_rate", "reduction", "seed", "discriminator_start",
        "discriminator_width", "lpips_weight", "kl_weight", "wavelet_weight", "adversarial_weight",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.size is not None:
        given["size"] = _height_and_width(options.size)
    device, dtype = _device_and_dtype(options)
    checkpoint = train_folder(
        options.folder,
        out=options.out,
        model=options.model,
        init=options.init,
        stage=options.stage,
        steps=options.steps,
        lpips=options.lpips,
        given=given,
        save_every=options.save_every,
        limits=_limits(options),
        device=device,
        dtype=dtype,
        workers=options.workers,
    )
    print(checkpoint)


def _height_and_width(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--size {text}: give height and width, such as 256x256")
    return int(sides[0]), int(sides[1])


def _vae_stats(options: argparse.Namespace) -> None:
    from skiparse.models.wfvae import stats

    device, dtype = _device_and_dtype(options)
    made = stats.run(
        options.model,
        options.clips,
        options.out,
        frames=options.frames,
        size=_height_and_width(options.size),
        every=options.every,
        cuts=options.cuts,
        seed=options.seed,
        limits=_limits(options),
        device=device,
        dtype=dtype,
        workers=options.workers,
    )
    print(made)


def _eval_vae(options: argparse.Namespace) -> None:
    from skiparse.models.wfvae import evaluate

    device, dtype = _device_and_dtype(options)
    evaluate.run(
        options.model,
        options.clips,
        options.out,
        frames=options.frames,
        size=(options.height, options.width),
        fps=options.fps,
        tile=options.tile,
        overlap=options.overlap,
        lpips=options.lpips,
        fvd=options.fvd,
        limits=_limits(options),
        device=device,
        dtype=dtype,
    )


if __name__ == "__main__":
    sys.exit(main())
