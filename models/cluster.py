"""What training would take on many devices: the estimates of ``skiparse plan --cluster FILE``.

Every figure is an estimate, and none was measured. What is counted: operations and what processes
that share a video send, by the formulas that the tests hold to real runs; and what autograd keeps
for the backward pass, by a block of real size without its memory. What is taken from the file: how
many operations and bytes a device does in a second. What is left out: that communication and
computing overlap, which makes a step shorter; encoders (train from a cache), workspace of kernels,
and memory that is lost between tensors.

Weights are in shards over all devices (FSDP2) as the trainer has them: float32 weights, gradients,
two moments and an average, 20 bytes of a parameter in all; a block's weights are gathered for its
forward and again for its backward, and its gradients are reduced once a step.
"""

from __future__ import annotations

import functools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from skiparse import SkipPattern
from skiparse.layout import Route
from skiparse.models.plain_yaml import read_yaml
from skiparse.models.planning import OSP_NEXT, Context
from skiparse.models.retrofit.cost import cost_of
from skiparse.models.retrofit.model import retrofit
from skiparse.models.suv import sparsity as suv_sparsity
from skiparse.models.suv.blocks import SUVBlock
from skiparse.models.suv.model import SUV
from skiparse.models.suv.plan import route_of
from skiparse.models.suv.recipe import sizes_of
from skiparse.models.train.config import load

DEVICES = (8, 16, 32, 64, 128, 256, 512)
STATE = 20  # bytes of a parameter: weight, gradient, two moments and average in float32
_FLOAT, _HALF = 4, 2  # bytes
_TEXT = suv_sparsity.TEXT_TOKENS
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the devices can do, and what joins them.

    Args:
        memory: of a device, in GiB.
        flops: operations that a device really does in a second of training, a multiply-add as two.
        devices_per_machine: how many are in one machine.
        inside: bytes that a device sends in a second to others of its machine.
        between: the same to other machines.
    """

    memory: float
    flops: float
    devices_per_machine: int
    inside: float
    between: float

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{each.name} must be a number above 0, got {value!r}")
        if self.devices_per_machine != int(self.devices_per_machine):
            raise ValueError(
                f"devices_per_machine must be a whole number, got {self.devices_per_machine}"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cluster:
        """The figures in a YAML file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: for figures that are missing, unknown or make no sense.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"--cluster {path} is not there; give a file of figures")
        try:
            read = read_yaml(Path(path))
        except ValueError as error:
            raise ValueError(f"--cluster {error}") from error
        names = {each.name for each in fields(cls)}
        if not isinstance(read, dict) or set(read) != names:
            raise ValueError(
                f"--cluster {path} must have the figures {', '.join(sorted(names))}, got "
                f"{', '.join(map(str, read)) if isinstance(read, dict) else read!r}"
            )
        try:
            return cls(**read)
        except ValueError as error:
            raise ValueError(f"--cluster {path}: {error}") from error

    def bandwidth(self, devices: int) -> float:
        """Bytes in a second that one of so many neighbours sends to the others."""
        return self.inside if devices <= self.devices_per_machine else self.between


@dataclass(frozen=True)
class Setting:
    """How a stage is trained.

    Args:
        devices: all of them; weights are in shards over them.
        batch: samples in a step, of all.
        accumulate: micro-batches of a step, one after the other.
        context: devices that share the tokens of a sample.
        checkpointing: what is computed again in the backward pass: none, feed_forward or block.
    """

    devices: int
    batch: int
    accumulate: int
    context: int
    checkpointing: str

    @property
    def parts(self) -> int:
        """In how many micro-batches the samples of a step are."""
        return self.devices // self.context * self.accumulate

    @property
    def divides(self) -> bool:
        """Whether whole groups of devices have whole samples."""
        return self.devices % self.context == 0 and self.batch % self.parts == 0

    @property
    def micro_batch(self) -> int:
        """Samples in a micro-batch."""
        return self.batch // self.parts


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a block, in bytes: of each sample, and of any number (weights)."""

    sample: int
    always: int


class Model(ABC):
    """A denoiser in training, as far as it can be counted."""

    tokens: int  # of a video
    parameters: int
    block: int  # parameters of a block
    layers: int
    head_dim: int
    text: int  # numbers of text that an all-reduce in each layer averages, of a sample
    out: int  # numbers of a token that all processes get in the end
    moves_again: bool  # whether a block that is computed again moves its tokens again

    @property
    def rest(self) -> int:
        """Parameters outside the blocks, which stay gathered through a step."""
        return self.parameters - self.layers * self.block

    @abstractmethod
    def route(self, processes: int) -> Route:
        """Where the tokens of a sample lie when so many share them."""

    @abstractmethod
    def flop(self, processes: int) -> int:
        """Operations of one of so many processes for a forward of a sample."""

    @abstractmethod
    def flop_again(self, processes: int, checkpointing: str) -> int:
        """Of those, what is done again in the backward pass."""

    @abstractmethod
    def kept(self, tokens: int, checkpointing: str) -> Kept:
        """By one block with so many video tokens."""

    @abstractmethod
    def between(self, tokens: int) -> int:
        """Bytes of a sample that a block leaves to the next."""

    def sent(self, processes: int) -> float:
        """Bytes that one of so many processes sends to others for a forward of a sample."""
        return self._bytes(self._exchanged(processes), self.layers, processes)

    def sent_back(self, processes: int, checkpointing: str) -> float:
        """The same for its backward, and for what is computed again in it.

        The gradient of what the last layer makes of the text is none.
        """
        exchanged, reduced = self._exchanged(processes), self.layers - 1
        if checkpointing == "block":
            exchanged += self._exchanged_again(processes)
            reduced += self.layers
        return self._bytes(exchanged, reduced, processes)

    def _exchanged(self, processes: int) -> int:
        """Numbers that all processes give to others: what layers need, and the whole in the end."""
        last = self.tokens * self.out * (processes - 1)
        return self.route(processes).sent * self.head_dim + last

    def _exchanged_again(self, processes: int) -> int:
        made = self.route(processes)
        if self.moves_again:
            return made.sent * self.head_dim
        pairs = zip(made.patterns, made.layouts, strict=True)
        return sum(layout.sent(pattern, made.heads) for pattern, layout in pairs) * self.head_dim

    def _bytes(self, exchanged: int, reduced: int, processes: int) -> float:
        """Of one process, with all-reduces in so many layers: round a ring and back."""
        ring = 2 * (processes - 1) * self.text * reduced
        return (exchanged + ring) * _HALF / processes


class SUVModel(Model):
    """An SUV in a stage of its training.

    Args:
        preset: its size.
        tokens: of a video.
        sparsity: of each part of the U; None for its own.
        skips: whether it has skips.
    """

    moves_again = False

    def __init__(
        self, sizes: Mapping[str, Any], tokens: int, sparsity: tuple[int, ...] | None, skips: bool
    ) -> None:
        self.sizes, self.tokens, self.skips = sizes, tokens, skips
        self.sparsity = tuple(sizes["sparsity"] if sparsity is None else sparsity)
        self.head_dim, self.heads = sizes["head_dim"], sizes["num_heads"]
        self.width, self.layers = self.head_dim * self.heads, sum(sizes["num_layers"])
        self.text, self.out = _TEXT * self.width, 4 * sizes["out_channels"]
        self.parameters, self.block = _parameters(_frozen(sizes), skips)

    def route(self, processes: int) -> Route:
        """As the model has it."""
        layers = tuple(self.sizes["num_layers"])
        return route_of(self.tokens, layers, self.sparsity, self.heads, self.skips, processes)

    def flop(self, processes: int) -> int:
        """Exact for one process; text is computed by each, all else shared out."""
        return self._video // processes + self._text

    @property
    def _video(self) -> int:
        s, N, d = self.sizes, self.tokens, self.width
        linear = self.layers * 24 * d * d + 8 * d * (s["in_channels"] + s["out_channels"])
        if self.skips:
            linear += len(s["num_layers"]) // 2 * 4 * d * d
        attention = sum(
            number * suv_sparsity.attention_cost(N, _TEXT, k, d)
            for number, k in zip(s["num_layers"], self.sparsity, strict=True)
        )
        return N * linear + attention

    @property
    def _text(self) -> int:
        s, T, d, c = self.sizes, _TEXT, self.width, self.sizes["timestep_channels"]
        rows = self.layers * 24 * d * d - 18 * d * d  # of the last, three projections
        rows += 2 * s["text_channels"] * d
        if self.skips:
            rows += len(s["num_layers"]) // 2 * 4 * d * d
        once = 2 * c * (self.layers * 2 * 6 * d + 2 * d + s["pooled_channels"] + 3 * c)
        return T * rows + once

    def flop_again(self, processes: int, checkpointing: str) -> int:
        """The feed-forwards, or whole blocks."""
        if checkpointing == "block":
            return self.flop(processes)
        if checkpointing == "none":
            return 0
        wide = 16 * self.width**2
        return self.layers * wide * self.tokens // processes + (self.layers - 1) * wide * _TEXT

    def kept(self, tokens: int, checkpointing: str) -> Kept:
        """Counted on a block of that size."""
        s = self.sizes
        shape = (s["num_heads"], s["head_dim"], s["timestep_channels"], s.get("double_ff", True))
        return _kept_by_suv(shape, tokens, checkpointing)

    def between(self, tokens: int) -> int:
        """Both streams, in bfloat16."""
        return (tokens + _TEXT) * self.width * _HALF


class WanModel(Model):
    """A Wan 2.1 of 14B, sparse in 2-D as OSP-Next is, whole blocks computed again.

    Args:
        shape: of a clip, in frames, height and width.
    """

    head_dim, heads, layers, wide, text, out = 128, 40, 40, 13824, 0, 64
    moves_again = True

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape, self.width = shape, self.head_dim * self.heads
        with torch.device("meta"):
            model = WanTransformer3DModel()  # of 14B, by default
        self.parameters, self.block = _count(model), _count(model.blocks[0])
        self.whole = cost_of(model, lambda twin: retrofit(twin, dense=(4, 4)), *shape)
        self.tokens = self.whole.tokens

    def route(self, processes: int) -> Route:
        """As ``skiparse plan`` has it."""
        return Context.of(OSP_NEXT, self.shape, processes).route

    def flop(self, processes: int) -> int:
        """The whole model's, shared out; of text there is little."""
        return self.whole.sparse // processes

    def flop_again(self, processes: int, checkpointing: str) -> int:
        """All of it."""
        return self.flop(processes) if checkpointing == "block" else 0

    def kept(self, tokens: int, checkpointing: str) -> Kept:
        """Counted on a block of that size."""
        if checkpointing == "block":
            return Kept(self.between(tokens), 0)
        return _kept_by_wan(self.width, self.wide, self.heads, tokens)

    def between(self, tokens: int) -> int:
        """One stream, in bfloat16."""
        return tokens * self.width * _HALF


def _frozen(sizes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(x) if isinstance(x, list) else x) for k, x in sizes.items())


@functools.lru_cache(64)
def _parameters(sizes: tuple[tuple[str, Any], ...], skips: bool) -> tuple[int, int]:
    """Of an SUV: of all, and of a block."""
    with torch.device("meta"):
        model = SUV(**{**dict(sizes), "skip_connection": skips})
    first: Any = model.stages[0]
    return _count(model), _count(first[0])


def _count(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


@functools.lru_cache(256)
def _kept_by_suv(shape: tuple[int, int, int, bool], tokens: int, checkpointing: str) -> Kept:
    heads, head_dim, condition, double = shape
    width = heads * head_dim
    if checkpointing == "block":
        return Kept((tokens + _TEXT) * width * _HALF, 0)

    def make() -> nn.Module:
        return SUVBlock(
            heads, head_dim, condition, double_ff=double, last=False, norm="layer_norm", eps=1e-6
        )

    def call(block: nn.Module, batch: int) -> Any:
        rotary = torch.zeros(tokens, head_dim // 2), torch.zeros(tokens, head_dim // 2)
        video, text = (
            torch.zeros(batch, n, width, dtype=torch.bfloat16, requires_grad=True)
            for n in (tokens, _TEXT)
        )
        told = torch.zeros(batch, condition, requires_grad=True)
        again = checkpointing == "feed_forward"
        return block(video, text, told, rotary, SkipPattern.dense(), None, None, again)

    return kept_by(make, call)


@functools.lru_cache(64)
def _kept_by_wan(width: int, wide: int, heads: int, tokens: int) -> Kept:
    def make() -> nn.Module:
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        block: nn.Module = WanTransformerBlock(width, wide, heads, cross_attn_norm=True)
        return block

    def call(block: nn.Module, batch: int) -> Any:
        video, text = (
            torch.zeros(batch, n, width, dtype=torch.bfloat16, requires_grad=True)
            for n in (tokens, _TEXT)
        )
        rotary = [torch.zeros(1, tokens, 1, width // heads) for _ in range(2)]
        return block(video, text, torch.zeros(batch, 6, width, requires_grad=True), rotary)

    return kept_by(make, call)


def kept_by(make: Callable[[], nn.Module], call: Callable[[nn.Module, int], Any]) -> Kept:
    """What autograd keeps of a module called with a batch, in bfloat16 by autocast; no memory.

    Parameters themselves do not count; their copies in bfloat16 are what is kept of any batch.
    """
    one, two = (_saved(make, call, batch) for batch in (1, 2))
    return Kept(two - one, 2 * one - two)


def _saved(make: Callable[[], nn.Module], call: Callable[[nn.Module, int], Any], batch: int) -> int:
    with FakeTensorMode():
        block = make().train()
        own = {x.untyped_storage()._cdata for x in block.parameters()}
        saved: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            saved.append(x)
            return x

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
        ):
            out = call(block, batch)
        sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
        del out
    return sum(size for key, size in sizes.items() if key not in own)


@dataclass(frozen=True)
class Estimate:
    """A stage on so many devices.

    Args:
        name: of the stage.
        model: in it.
        setting: how it is trained.
        cluster: on what.
    """

    name: str
    model: Model
    setting: Setting
    cluster: Cluster

    # Seconds of a step.

    @property
    def computing(self) -> float:
        """Forward, twice as much backward, and what is done again."""
        s, m = self.setting, self.model
        one = 3 * m.flop(s.context) + m.flop_again(s.context, s.checkpointing)
        return s.accumulate * s.micro_batch * one / self.cluster.flops

    @property
    def sharing(self) -> float:
        """Tokens and heads between devices that share a sample, forward and backward."""
        s = self.setting
        if s.context == 1:
            return 0.0
        one = self.model.sent(s.context) + self.model.sent_back(s.context, s.checkpointing)
        return s.accumulate * s.micro_batch * one / self.cluster.bandwidth(s.context)

    @property
    def weights(self) -> float:
        """Weights gathered twice for each micro-batch, gradients reduced once."""
        s = self.setting
        most = (s.devices - 1) / s.devices * self.model.parameters * _FLOAT
        return (2 * s.accumulate + 1) * most / self.cluster.bandwidth(s.devices)

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.computing + self.sharing + self.weights

    # Bytes of a device.

    @property
    def state(self) -> float:
        """Its shard of weights, gradients, moments and average."""
        return STATE * self.model.parameters / self.setting.devices

    @property
    def gathered(self) -> float:
        """Weights of two blocks and of what is in none, and the gradients of one block."""
        return (3 * self.model.block + self.model.rest) * _FLOAT

    @property
    def tokens(self) -> int:
        """Of a sample on one device, at most."""
        model, shared = self.model, self.setting.context
        if shared == 1:
            return model.tokens
        return max(max(layout.sizes) for layout in set(model.route(shared).layouts))

    @property
    def activations(self) -> float:
        """What is kept for the backward pass, and what of one block is made again."""
        s, m = self.setting, self.model
        kept, whole = m.kept(self.tokens, s.checkpointing), m.kept(self.tokens, "none")
        samples = m.layers * kept.sample + whole.sample
        return s.micro_batch * samples + m.layers * kept.always + whole.always

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.state + self.gathered + self.activations

    @property
    def fits(self) -> bool:
        """Whether a device has room."""
        return self.setting.divides and self.bytes <= self.cluster.memory * _GIB

    def remedy(self) -> str:
        """The least that makes it fit: tried alone, then together, in this order."""
        s = self.setting
        steps: list[tuple[str, Iterator[Setting]]] = [
            ("checkpointing: block", iter([replace(s, checkpointing="block")])),
            ("accumulate: {0.accumulate}", self._more(s, "accumulate", s.batch)),
            ("context_parallel: {0.context}", self._more(s, "context", min(s.devices, 64))),
            ("{0.devices} devices, which are more shards", self._more(s, "devices", 4096)),
        ]
        for words, settings in steps:
            for setting in settings:
                if replace(self, setting=setting).fits:
                    return words.format(setting)
        both = replace(s, checkpointing="block")
        for setting in self._more(both, "context", 64):
            for more in (setting, *self._more(setting, "accumulate", s.batch)):
                for most in (more, *self._more(more, "devices", 4096)):
                    if replace(self, setting=most).fits:
                        return (
                            f"checkpointing: block, context_parallel: {most.context}, accumulate: "
                            f"{most.accumulate} and {most.devices} devices"
                        )
        return "devices with more memory"

    def complaint(self) -> str:
        """What does not fit, of what it is made, and the remedy."""
        samples = self.setting.micro_batch
        parts = {
            "weights, gradients, moments and average": self.state,
            "gathered weights": self.gathered,
            f"activations of {samples} sample{'s' if samples > 1 else ''}": self.activations,
        }
        what = ", ".join(f"{size / _GIB:,.1f} GiB of {part}" for part, size in parts.items())
        return (
            f"The first that does not fit: {self.name} on {self.setting.devices} devices, by "
            f"estimate {self.bytes / _GIB:,.1f} of {self.cluster.memory:g} GiB:\n{what}.\n"
            f"Remedy: {self.remedy()}."
        )

    @staticmethod
    def _more(setting: Setting, name: str, most: int) -> Iterator[Setting]:
        """Twice as many, again and again."""
        number = 2 * getattr(setting, name)
        while number <= most:
            yield replace(setting, **{name: number})
            number *= 2


Row = tuple[str, Model, Callable[[int], Setting]]


def stages(chain: str = "v1.5") -> Iterator[Row]:
    """Of a chain of SUV, and the 14B: name, model, and how it is trained on so many devices."""
    config = load(chain, [f"--{name}=unused" for name in ("out", "source", "vae", "text")])
    sizes = sizes_of(config)
    for name, stage in config.stages.items():
        tokens = suv_sparsity.tokens(_shape(stage.rule))
        yield (
            name,
            SUVModel(sizes, tokens, stage.sparsity, stage.skip_connection),
            functools.partial(
                Setting,
                batch=stage.global_batch,
                accumulate=stage.accumulate,
                context=config.context_of(stage),
                checkpointing=stage.checkpointing,
            ),
        )
    yield "14B", WanModel((81, 720, 1280)), lambda n: Setting(n, n // 4, 1, 4, "block")


def _shape(rule: Any) -> tuple[int, int, int]:
    """The largest clip of a stage: its size, or a square of its pixels."""
    side = math.isqrt(rule.max_pixels) if rule.size is None else 0
    height, width = rule.size or (side, side)
    return rule.frames, height, width


def table(cluster: Cluster, devices: tuple[int, ...] = DEVICES) -> str:
    """Seconds of a step and GiB of a device for every stage, and the first that does not fit."""
    rows = [("stage", "tokens", "samples", "shared by", *(f"{n} devices" for n in devices))]
    tight: Estimate | None = None
    for name, model, setting_of in stages():
        found = [Estimate(name, model, setting_of(n), cluster) for n in devices]
        tight = next((x for x in (tight, *found) if x and x.setting.divides and not x.fits), None)
        last = found[-1].setting
        facts = (name, f"{model.tokens:,}", f"{last.batch:,}", str(last.context))
        rows.append((*facts, *map(_cell, found)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    device = (
        f"A device: {cluster.flops:.3g} operations a second, {cluster.memory:g} GiB, and "
        f"{cluster.inside:.3g} bytes a second\nto others of the {cluster.devices_per_machine:g} in "
        f"its machine, {cluster.between:.3g} to other machines."
    )
    lines = [
        "ESTIMATES, none of them measured: seconds of a step if nothing overlaps, GiB of a device.",
        device,
        "! has no room, - cannot be dealt out; of the 14B each group has one sample in a step.",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        "",
        "All of it fits." if tight is None else tight.complaint(),
    ]
    return "\n".join(lines)


def _cell(found: Estimate) -> str:
    if not found.setting.divides:
        return "-"
    return f"{found.seconds:.3g} s {found.bytes / _GIB:,.0f} GiB{'' if found.fits else '!'}"
