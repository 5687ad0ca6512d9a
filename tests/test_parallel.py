"""Several processes that share tokens are one, and send what the formula says."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from processes import lines, torchrun
from torch.autograd.profiler import profile
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from skiparse import GridPattern, SkipPattern
from skiparse.layout import Layout
from skiparse.parallel import skip_exchange, ulysses_attention, ulysses_joint_attention

N = 16
SINGLE, GROUP = (Layout.of(p, N, 2) for p in (SkipPattern.single(4), SkipPattern.group(4)))


def check(found, number):
    """Outputs, gradients of inputs, text and parameters; then elements, counted and computed."""
    assert len(found) == number
    for name, *rest in found:
        errors, sent = rest[: rest.index("sent")], rest[rest.index("sent") + 1 :]
        assert len(errors) == 4
        assert max(map(float, errors)) < 1e-12, (name, errors)
        *counts, _, formula, per_text = sent
        forward, backward, reduced, reduced_back = map(int, counts)
        again = "_again" in name  # a checkpoint computes and sends once more
        assert forward == int(formula), name
        assert reduced == int(per_text), name
        assert reduced_back == (1 + again) * reduced, name
        if again:
            assert forward <= backward <= 2 * forward, name
        else:
            assert backward == forward, name


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.full)])
def test_processes_are_one(processes):
    check(lines("parallel_run.py", processes, "few"), 27)


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 3, 4, 6])
def test_all_cases_in_processes(processes):
    check(lines("parallel_run.py", processes), 71)


def check_model(found, number):
    """Errors as above, then elements of forward and backward: counted, and as they are planned."""
    assert len(found) == number
    for name, *rest in found:
        *errors, _, sent, _, planned = rest
        assert max(map(float, errors)) < 1e-12, (name, errors)
        assert int(sent) == int(planned), (name, sent, planned)


def test_processes_that_share_an_suv():
    check_model(lines("parallel_suv.py", 2, "few"), 7)


@pytest.mark.full
@pytest.mark.parametrize(("processes", "cases"), [(2, 14 + 5), (3, 14), (4, 14 + 5), (8, 1)])
def test_all_cases_of_an_suv(processes, cases):
    """Of eight processes two share tokens, two share layers, and two have a batch of their own."""
    check_model(lines("parallel_suv.py", processes), cases)


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_that_share_a_wan(processes):
    check_model(lines("parallel_wan.py", processes), 4)


@pytest.fixture
def two():
    """Rank 0 of two processes, the other of which is not there: nothing may be sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def qkv(n=N // 2, heads=2):
    return torch.ones(3, 1, n, heads, 8).unbind(0)


@pytest.mark.usefixtures("two")
def test_bad_arguments_are_named():
    text = torch.ones(3, 1, 4, 2, 8).unbind(0)
    attend = lambda *a, **k: ulysses_attention(*a, SkipPattern.single(4), SINGLE, **k)  # noqa: E731
    q, k, v = qkv()
    for call, words in (
        (lambda: attend(*qkv(7)), r"q has 7 tokens along dim=1, but process 0 owns 8 of 16"),
        (lambda: attend(q, k, v[..., :4]), r"v has shape \[1, 8, 2, 4\] but q has"),
        (
            lambda: attend(q, k, v, mask=torch.ones(1, 8) > 0),
            r"mask has shape \[1, 8\], expected \[1, 16\]",
        ),
        (lambda: attend(q, k, v, scale=float("nan")), "scale must be a finite number"),
        (lambda: attend(q, k, v, backend="none"), "none"),
        (
            lambda: ulysses_attention(q, k, v, GridPattern.single((1, 3, 5), 2), SINGLE),
            "has 15 tokens, not 16",
        ),
        (
            lambda: ulysses_joint_attention(
                q, k, v, *text, SkipPattern.single(4), SINGLE, text_mask=torch.ones(1, 5) > 0
            ),
            r"text_mask has shape \[1, 5\], expected \[1, 4\]",
        ),
        (lambda: ulysses_attention(q, k, v, "dense", SINGLE), "pattern must be a SkipPattern"),
        (lambda: ulysses_attention(q, k, v, SkipPattern(1), "rows"), "a layout must be a"),
        (
            lambda: ulysses_attention(q, k, v, SkipPattern(1), Layout.of(SkipPattern(4), N, 4)),
            "the layout is for 4 processes, but the group has 2; make it with Layout.of",
        ),
        (
            lambda: skip_exchange(q, SINGLE, GROUP, dim=4),
            "x must be a tensor with tokens along dim=4",
        ),
        (
            lambda: skip_exchange(q[:, :5], SINGLE, GROUP),
            r"x has 5 tokens .* give x\[:, layout.owned",
        ),
        (
            lambda: skip_exchange(q, SINGLE, Layout.of(SkipPattern(4), 17, 2)),
            "as many tokens and processes; got 16 and 17",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.usefixtures("two")
def test_the_group_may_be_a_mesh_of_one_dimension():
    from torch.distributed.device_mesh import init_device_mesh

    x = torch.ones(1, N // 2, 3)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "context"))
    assert skip_exchange(x, SINGLE, GROUP, mesh["context"]).shape == x.shape
    with pytest.raises(
        ValueError, match=r'mesh of 2 dimensions; give the one .* mesh\["context"\]'
    ):
        skip_exchange(x, SINGLE, GROUP, mesh)


def test_without_processes_there_is_nothing_to_share():
    with pytest.raises(
        ValueError, match=r"call torch\.distributed\.init_process_group, under torchrun"
    ):
        skip_exchange(torch.ones(1, N // 2, 3), SINGLE, GROUP)


@pytest.mark.usefixtures("two")
def test_half_precision_and_autocast_keep_their_dtypes():
    dense, layout = SkipPattern.dense(), SINGLE
    text = torch.ones(3, 1, 4, 2, 8)
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in qkv())
        out, text_out = ulysses_joint_attention(q, k, v, *text.to(dtype), dense, layout)
        assert out.dtype == text_out.dtype == dtype
        assert skip_exchange(q, SINGLE, GROUP).dtype == dtype
    nothing = Layout(SkipPattern.single(2), 0, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        none, no_text = ulysses_joint_attention(*qkv(0), *text, dense, nothing)
        assert none.dtype == no_text.dtype == torch.bfloat16
        for pattern in (dense, SkipPattern.single(4)):
            out, text_out = ulysses_joint_attention(*qkv(), *text, pattern, layout)
            assert out.dtype == text_out.dtype == torch.bfloat16


def test_what_an_suv_shares_its_tokens_with():
    from types import SimpleNamespace

    from skiparse.models import SUV

    model = SUV(**SUV.presets["tiny"])
    for given in (
        {"config": SimpleNamespace(ring_degree=2, ulysses_degree=1)},
        {"config": SimpleNamespace(ring_degree=1, ulysses_degree=2), "cp_plan": {"": {}}},
    ):
        with pytest.raises(ValueError, match="by layouts of its own: got ring_degree="):
            model.enable_parallelism(**given)


@pytest.mark.usefixtures("two")
def test_what_cannot_be_dealt_out_is_refused():
    from torch.distributed.device_mesh import init_device_mesh

    from skiparse.models import SUV
    from skiparse.models.suv.tensor_parallel import deal_out

    mesh = init_device_mesh("cpu", (2,))
    for changes, words in (
        ({"num_heads": 3}, "tensor_parallel=2 must divide the heads of the model, 3"),
        ({"experts": (1, 1, 4, 1, 1)}, "tensor_parallel=2: nothing deals out experts"),
    ):
        model = SUV(**SUV.presets["tiny"] | changes)
        with pytest.raises(ValueError, match=words):
            deal_out(model.stages[2][0], mesh)
        assert not any(isinstance(x, DTensor) for x in model.parameters())


@pytest.mark.usefixtures("two")
def test_diffusers_way_to_share_tokens(monkeypatch):
    """What comes of it is compared with one process among all cases of an SUV."""
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig

    from skiparse.models import SUV

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # by which it divides
    model = SUV(**SUV.presets["tiny"])
    for config, kind, words in (
        (ContextParallelConfig(ring_degree=2), ValueError, "got ring_degree=2"),
        (ContextParallelConfig(ulysses_degree=3), RuntimeError, "size 2, but found 3 ranks"),
        (TensorParallelConfig(tp_degree=2), ValueError, "SUV"),
    ):
        with pytest.raises(kind, match=words):
            model.enable_parallelism(config=config)
        assert model._sharing is None
        model._parallel_config = None
    whole = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    for config in (ContextParallelConfig(ulysses_degree=2), whole):
        model = SUV(**SUV.presets["tiny"])
        model.enable_parallelism(config=config)
        assert model._sharing.group.size() == 2
        with pytest.raises(RuntimeError, match="cannot be"):
            model.enable_parallelism(config=config)


class Called(TorchDispatchMode):
    """Names of operators, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("two")
def test_the_text_goes_on_while_the_video_is_on_its_way(monkeypatch):
    """The tokens leave in front of the feed-forward of the text, and are waited for behind it."""
    from skiparse.models.suv.blocks import SUVBlock
    from skiparse.models.suv.plan import SharedLayer

    block = SUVBlock(2, 16, 8, double_ff=True, last=False, norm="layer_norm", eps=1e-6)
    table = torch.ones(N // 2, 8)
    layer = SharedLayer(SkipPattern.single(4), SINGLE, GROUP, (table, table), dist.group.WORLD)
    real = collectives.wait_tensor

    def wait(x):
        called.names.append("::wait_tensor")  # which is called below what sees operators
        return real(x)

    monkeypatch.setattr(collectives, "wait_tensor", wait)
    with Called() as called, torch.no_grad():
        video, text, told = torch.ones(1, N // 2, 32), torch.ones(1, 3, 32), torch.ones(1, 8)
        block(video, text, told, layer.rotary, layer)
    kinds = [name.partition("::")[2].partition(".")[0] for name in called.names]
    leaves = kinds.index("all_to_all_single")
    waits = kinds.index("wait_tensor", leaves)
    assert kinds[leaves:waits].count("gelu") == 1  # the text's feed-forward, and nothing else's
    assert kinds[:leaves].count("gelu") == 1
    assert "gelu" not in kinds[waits:]


@pytest.mark.usefixtures("two")
def test_a_copy_of_a_shared_model_is_shared():
    import copy

    from skiparse.models import SUV

    model = SUV(**SUV.presets["tiny"])
    model.set_context_parallel(dist.group.WORLD)
    inputs = (
        torch.randn(1, 4, 2, 8, 8),
        torch.tensor([3.0]),
        torch.randn(1, 5, 24),
        torch.ones(1, 20),
    )
    assert copy.deepcopy(model)(*inputs).shape == model(*inputs).shape == inputs[0].shape


def test_wan_alone_shares_tokens():
    diffusers = pytest.importorskip("diffusers")
    from skiparse.models.retrofit import retrofit

    model = diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        cross_attention_dim=32, caption_channels=8, num_layers=2,
    )  # fmt: skip
    made = retrofit(model, kinds=("single", "group"))
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group"):
        made.share(None)


def test_the_table_of_a_plan(capsys):
    from skiparse.cli import main

    for preset, shape, number, words in (
        (
            "v1.5",
            "121x576x1024",
            "8",
            (
                "36,864 tokens for 8 processes",
                "75.00    1.98 GiB",
                "112.00    2.95 GiB",
                "1.49x less",
            ),
        ),
        ("v1.5", "121x576x1024", "2", ("22.00    2.32 GiB", "64.00    6.75 GiB", "2.91x less")),
        ("osp-next", "81x576x1024", "4", ("47.25", "120.00", "2.54x less", "group 2x2")),
    ):
        assert (
            main(["plan", "--preset", preset, "--shape", shape, "--context-parallel", number]) == 0
        )
        said = capsys.readouterr().out
        for word in words:
            assert word in said, said
    for arguments, words in (
        (["--shape", "121x576"], "--shape 121x576: give frames, height and width"),
        (["--preset", "7B"], "--preset 7B: give one of v1.5"),
        (["--shape", "80x576x1024"], "does not make whole tokens"),
        (["--preset", "osp-next", "--shape", "80x576x1024"], "must be 4n + 1: take 77 or 81"),
        (["--context-parallel", "1"], "--context-parallel 1: give two processes or more"),
    ):
        if "--context-parallel" not in arguments:
            arguments = [*arguments, "--context-parallel", "2"]
        assert main(["plan", *arguments]) != 0
        assert words in capsys.readouterr().err


def most_alive(call):
    """The most bytes that were there at once of those that a call made, and what it returned."""
    with profile(profile_memory=True) as seen:
        found = call()
    events = [x for x in seen.kineto_results.events() if x.name() == "[memory]"]
    held = itertools.accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns()))
    return max(held), found


@pytest.mark.parametrize("rank", [0, 5])
def test_no_process_makes_a_whole_model_to_begin_with_shards(rank):
    """One of eight, the others of which are not there; with the weights that one alone has."""
    from skiparse.models.data.buckets import Rule
    from skiparse.models.suv.recipe import SUVConfig, SUVRecipe, SUVStage
    from skiparse.models.train.parallel import World
    from skiparse.models.train.state import entered

    stage = SUVStage(
        steps=1, learning_rate=1.0, global_batch=8, rule=Rule(size=(32, 32)),
        linear_attention=(True, False, False, False, True),
    )  # fmt: skip
    sizes = {"timestep_channels": 8, "text_channels": 8, "pooled_channels": 8}
    config = SUVConfig(
        out="unused", preset="tiny", model=sizes, stages={"suv": stage}, cache="unused",
        parallel="fsdp", device="cpu",
    )  # fmt: skip
    wanted = SUVRecipe().initial(config, stage)
    whole = sum(x.numel() for x in wanted.parameters()) * 4
    block = sum(x.numel() for x in wanted.stages[0][0].parameters()) * 4
    others = whole - sum(x.numel() for x in wanted.stages.parameters()) * 4
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        world = World(rank, 8, torch.device("cpu"))
        most, state = most_alive(lambda: entered(None, stage, config, world))
        for model in (state.model, state.ema.model):
            for (name, x), (its, y) in zip(
                model.named_parameters(), wanted.named_parameters(), strict=True
            ):
                assert name == its
                parts = y.detach().chunk(8)
                assert torch.equal(x.to_local(), parts[rank] if rank < len(parts) else y[:0])
        held = sum(x.to_local().numel() for x in state.model.parameters()) * 4
        assert most < 4 * held + others + 2.5 * block < 0.9 * whole
    finally:
        dist.destroy_process_group()


def test_a_model_in_shards_gets_its_skips_without_sending_anything():
    (found,) = lines("entering.py", 2)
    calls, largest, most, held, numbers, error, average, *training = found
    assert int(calls) == 0
    assert 0 < int(largest) <= int(most)  # a new skip, or a shard: nothing of the model whole
    assert int(held) < 0.6 * int(numbers)
    assert float(error) == float(average) == 0
    assert training == ["True", "False"]


@pytest.mark.full
def test_the_one_that_hangs_is_named_and_not_its_group():
    done = torchrun(4, Path(__file__).with_name("hanging.py"), timeout=200)
    assert done.returncode != 0
    for rank in range(3):
        assert f"process {rank}: process 3 does not answer (timeout=5 s)" in done.stderr
