"""Processes that share the tokens of an SUV: `torchrun --nproc-per-node P tests/parallel_suv.py`.

Each case is compared with one process alone; `test_parallel.py` reads what the first one prints.
"""

import copy
import functools
import math
import sys

import diffusers
import torch
import torch.distributed as dist
from parallel_run import WAIT, averaged, far, grads
from volumes import Sent, elements

from skiparse.models import SUV
from skiparse.models.cluster import SUVModel
from skiparse.models.images import KnownFrames
from skiparse.models.suv.tensor_parallel import deal_out
from skiparse.models.train.parallel import World

torch.accelerator.device_count = lambda: 1  # diffusers 0.42 divides by it, which is 0 on a CPU
torch.Tensor.float = torch.Tensor.double  # the model's islands of fp32
BYTES = 2  # of a number, as the planner has it
WIDTH = {"num_heads": 3, "head_dim": 16}
SMALL = {"num_layers": (1, 2, 1), "sparsity": (1, 2, 1)}
DEEP = {"num_layers": (1, 2, 3, 2, 3, 2, 1), "sparsity": (1, 2, 4, 8, 4, 2, 1)}
MORE = {"linear_attention": (False, True, True), "experts": (1, 4, 3), "double_ff": False}
EVEN, RAGGED = (2, 16, 16), (3, 10, 14)  # 128 and 105 tokens

CASES = {
    "two blocks": (SMALL, EVEN, {}),
    "deep": (DEEP, EVEN, {}),
    "deep ragged masks": (DEEP, RAGGED, {"masks": True}),
    "no skips": (DEEP | {"skip_connection": False}, EVEN, {}),
    "checkpointed": (DEEP, RAGGED, {"checkpointing": "block"}),
    "feed-forward again": (DEEP, EVEN, {"checkpointing": "feed_forward"}),
    "by diffusers": (SMALL, EVEN, {"diffusers": True}),
    "compiled": (SMALL, RAGGED, {"compiled": "aot_eager"}),
    "compiled deep": (DEEP, EVEN, {"compiled": "aot_eager"}),
    "extended": (SMALL | MORE, RAGGED, {"masks": True}),
    "extended again": (SMALL | MORE, EVEN, {"checkpointing": "feed_forward"}),
    "images": (SMALL | {"images": "flash"}, RAGGED, {}),
    "images by masks": (SMALL | {"images": "mask"}, EVEN, {"checkpointing": "block"}),
    "extended compiled": (SMALL | MORE, RAGGED, {"masks": True, "compiled": "aot_eager"}),
}
FOUR = {"num_heads": 4}
DEALT = {  # out to processes, with heads that they divide
    "dealt out": (SMALL | FOUR, RAGGED, {"masks": True}),
    "dealt out deep": (DEEP | FOUR, RAGGED, {"masks": True, "checkpointing": "block"}),
    "dealt out again": (DEEP | FOUR, EVEN, {"checkpointing": "feed_forward"}),
    "dealt out with branches": (
        SMALL | FOUR | {"linear_attention": (False, True, True), "norm": "rms_norm"}, EVEN, {},
    ),
    "dealt out, text alike": (SMALL | FOUR | {"double_ff": False}, RAGGED, {}),
}  # fmt: skip
ALL = CASES | DEALT
MESHES = [  # case, and processes along data, tokens and layers
    ("deep ragged masks", 2, 2, 1),
    *((case, 1, 1, 2) for case in DEALT),
    ("dealt out deep", 2, 1, 2),
    ("dealt out again", 1, 2, 2),
    ("dealt out with branches", 1, 2, 2),
    ("dealt out", 1, 1, 4),
    ("dealt out deep", 2, 2, 2),
]
FEW = ("two blocks", "deep ragged masks", "checkpointed", "compiled", "extended", "images")


@functools.cache
def model(case):
    torch.manual_seed(0)
    made = SUV(**SUV.presets["tiny"] | WIDTH | ALL[case][0]).double()
    with torch.no_grad():
        for x in made.parameters():
            x.add_(torch.randn_like(x) * 0.05)
    return made


def inputs(case):
    sizes, size, how = ALL[case]
    made = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=made, dtype=torch.float64)  # noqa: E731
    given = [draw(2, 4, *size), torch.tensor([300.0, 700.0]).double(), draw(2, 5, 24), draw(2, 20)]
    for x in given:
        x.requires_grad_()
    masks = {}
    if how.get("masks"):
        masks = {
            "text_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
            "video_mask": (torch.rand(2, *size, generator=made) > 0.2).int(),
        }
    if "images" in sizes:
        known = torch.arange(size[0]).expand(2, -1) == 0
        latents = draw(2, 4, *size) * known[:, None, :, None, None]
        masks["images"] = KnownFrames(latents, known, torch.tensor([0.1, 0.5]).double())
    return given, masks


def run(case):
    """The velocity, and gradients of inputs and parameters: of a loss that all processes have."""
    given, named = inputs(case)
    its = model(case)
    its.zero_grad()
    found = its(*given, **named, return_dict=True)
    out, told = found.sample, found.imbalance
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    loss = (out * weights).sum()
    (loss if told is None else loss + 100 * (told * told).sum()).backward()
    return (
        out.detach(),
        [g.clone() for g in grads(*given)],
        [g.clone() for g in grads(*its.parameters())],
    )


def compare(case):
    sizes, _, how = CASES[case]
    wanted = run(case)
    rank, P = dist.get_rank(), dist.get_world_size()
    its = model(case)
    if how.get("diffusers"):
        its.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=P))
    else:
        its.set_context_parallel(dist.group.WORLD)
    if "checkpointing" in how:
        its.set_checkpointing((how["checkpointing"],) * len(sizes["num_layers"]))
    if "compiled" in how:
        torch._dynamo.reset()
        its.compile_repeated_blocks(backend=how["compiled"])
    with Sent(rank) as sent:
        found = run(case)
    errors = [
        far([found[0]], [wanted[0]]),
        far(averaged(found[1]), wanted[1]),
        0.0,
        far(averaged(found[2]), wanted[2]),
    ]
    worst = torch.tensor(errors, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    exchanged, reduced = elements(sent.exchanged, sent.reduced)
    counted = planned(case)
    if "experts" in sizes:  # which reduce more than the text, and the planner knows nothing of them
        reduced = counted.text = 0
    again = how.get("checkpointing", "none")
    formula = 2 * P * (counted.sent(P) + counted.sent_back(P, again)) / BYTES
    if rank == 0:
        print("case", case.replace(" ", "_"), *(f"{e:.2e}" for e in worst.tolist()),
              "sent", exchanged + 2 * (P - 1) * reduced // P, "formula", round(formula),
              flush=True)  # fmt: skip


def planned(case):
    """The case as `skiparse plan --cluster` counts it, with as much text as there is."""
    sizes, (t, h, w), how = CASES[case]
    whole = SUV.presets["tiny"] | WIDTH | sizes
    found = SUVModel(whole, t * h * w // 4, None, sizes.get("skip_connection", True))
    found.text = (4 if how.get("masks") else 5) * found.width  # without what is padding in all
    return found


def on_a_mesh(case, data, context, tensor):
    """Groups, each with a batch of its own; their processes share tokens, or layers, or both."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), tensor=tensor)
    its = copy.deepcopy(model(case))
    its.set_context_parallel(None)
    its.zero_grad()
    for sample in range(data):
        given, masks = inputs(case)
        loss_of(its, given, masks, sample).div(data).backward()
    wanted = its(*(x[:1] for x in given), **{name: x[:1] for name, x in masks.items()}).detach()
    wanted_grads = grads(*its.parameters())
    split = copy.deepcopy(its)
    split.zero_grad()
    if "checkpointing" in ALL[case][2]:
        split.set_checkpointing((ALL[case][2]["checkpointing"],) * len(split.stages))
    world.sharded(split, ("SUVBlock",), deal_out)
    for name in ("attn.to_q", "attn.to_out", "ff.linear_1", "ff.linear_2"):
        layer, whole = (x.stages[0][0].get_submodule(name).weight for x in (split, its))
        assert layer.to_local().numel() * dist.get_world_size() == whole.numel()
    shared = world.context(context)
    assert shared.count == data
    split.set_context_parallel(shared.group)
    found = split(*(x[:1] for x in given), **{name: x[:1] for name, x in masks.items()}).detach()
    loss_of(split, given, masks, shared.index).backward()
    worst = torch.tensor(
        [
            far([found], [wanted]),
            far([x.grad.full_tensor() for x in split.parameters()], wanted_grads),
        ]
    )
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        words = f"{case} on a mesh {data} {context} {tensor}".replace(" ", "_")
        print("case", words, *(f"{e:.2e}" for e in worst.tolist()),
              "sent", 0, "formula", 0, flush=True)  # fmt: skip


def loss_of(its, given, masks, sample):
    """That of one sample of the batch."""
    own = slice(sample, sample + 1)
    out = its(*(x[own].detach() for x in given), **{name: x[own] for name, x in masks.items()})
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(sample)).double()
    return (out * weights).sum()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=WAIT)
    few, P = sys.argv[1:] == ["few"], dist.get_world_size()
    if P < 8:
        for case in FEW if few else CASES:
            compare(case)
    for case, *sides in MESHES:
        if math.prod(sides) == P and (not few or case == "dealt out"):
            on_a_mesh(case, *sides)
    dist.destroy_process_group()
