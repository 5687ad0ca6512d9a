"""The three roles of the ping-pong kernel never wait for ever, nor touch a slot that is in use.

There is no GPU here, and Triton's interpreter knows no Gluon. So the very source of the roles runs
as Python on a model of what they call: barriers with phases, copies that land at any time, products
that end in the order of their warpgroup. What happens next is drawn, or one role is always late.
What comes out must be attention; and the model must see what is wrong with wrong sources. Key masks
are played too; where rows of a block lie, which ``device.py`` says, is written here once more.
"""

import ast
import importlib.metadata
import inspect
import math
import random
import textwrap
from types import SimpleNamespace

import pytest
import torch
import triton as module
from torch._subclasses import FakeTensorMode

from skiparse import SkipPattern
from skiparse.backends import Inputs
from skiparse.backends.triton import pingpong
from skiparse.backends.triton import pingpong_kernel as kernel

ROWS, BLOCK, HEAD_DIM = 4, 8, 4  # query rows of a consumer, keys of a block
ROLES = ("first", "second", "producer")
CALLS = (
    "mbarrier.wait", "mbarrier.expect", "mbarrier.arrive", "tma.async_copy_global_to_shared",
    "warpgroup_mma", "warpgroup_mma_wait",
)  # fmt: skip


class Broken(Exception):
    """The roles did what hardware does not forgive."""


class Barrier:
    """A phase ends when ``count`` have arrived and all expected bytes have; its parity is told."""

    def __init__(self, count):
        self.count = self.missing = count
        self.bytes = self.phases = 0

    def arrive(self, count=1, expected=0):
        self.bytes += expected
        self.missing -= count
        self.settle()

    def settle(self):
        if self.missing < 0:
            raise Broken("more arrivals than a phase has")
        if self.missing == self.bytes == 0:
            self.phases += 1
            self.missing = self.count


class Slot:
    """A tile in shared memory; views share what is stored and who reads."""

    dtype = torch.float64

    def __init__(self, shape, store=None, view=lambda x: x):
        self.shape = shape
        self.store = store or SimpleNamespace(tile=None, readers=0)
        self.view = view

    def read(self):
        if self.store.tile is None:
            raise Broken("read before anything has landed")
        return self.view(self.store.tile)

    def reshape(self, shape):
        return Slot(shape, self.store, lambda x: self.view(x).reshape(shape))

    def permute(self, order):
        shape = [self.shape[i] for i in order]
        return Slot(shape, self.store, lambda x: self.view(x).permute(order))


class Ring(list):
    index = list.__getitem__


class Product:
    """``a @ b + acc``, known when it has ended; both are read until then."""

    def __init__(self, a, b, acc, use_acc):
        self.operands = [x for x in (a, b) if isinstance(x, Slot)]
        self.a, self.b, self.acc, self.value = a, b, acc if use_acc else 0 * acc, None
        for slot in self.operands:
            slot.store.readers += 1

    def end(self):
        a, b = (x.read() if isinstance(x, Slot) else x for x in (self.a, self.b))
        self.value = a @ b + self.acc
        for slot in self.operands:
            slot.store.readers -= 1


class Machine:
    """Lets one role go on, one copy land or one product end at a time, until the roles return."""

    def __init__(self, roles, choose):
        self.roles, self.choose = roles, choose
        self.calls = {name: next(role) for name, role in roles.items()}
        self.copies, self.products, self.results = [], {name: [] for name in roles}, {}

    def run(self):
        while moves := self.moves():
            move, *what = self.choose(moves)
            getattr(self, move)(*what)
        if self.calls:
            raise Broken(f"for ever: {self.calls}")
        if any(self.products.values()):
            raise Broken("products nobody waited for")
        return self.results

    def moves(self):
        return [
            *(("go_on", name) for name in self.calls if self.may_go_on(name)),
            *(("land", i) for i in range(len(self.copies))),
            *(("end", name) for name in self.products if self.products[name]),
        ]

    def may_go_on(self, name):
        call, args = self.calls[name][:2]
        if call == "mbarrier.wait":
            return args[0].phases & 1 != args[1]
        return call != "warpgroup_mma_wait" or len(self.products[name]) <= args[0]

    def go_on(self, name):
        call, args, options = self.calls.pop(name)
        answer = None
        if call == "mbarrier.expect":
            args[0].arrive(expected=args[1])
        elif call == "mbarrier.arrive":
            args[0].arrive(**options)
        elif call == "tma.async_copy_global_to_shared":
            source, at, barrier, slot = args
            self.copies.append((barrier, slot, source.read(at)))
        elif call == "warpgroup_mma":
            assert options.pop("is_async")
            answer = Product(*args, options.get("use_acc", True))
            self.products[name].append(answer)
        elif call == "warpgroup_mma_wait":
            answer = [x.value if isinstance(x, Product) else x for x in args[1]]
            if any(x is None for x in answer):
                raise Broken("a product is used before it has ended")
            answer = answer if len(answer) > 1 else answer[0]
        try:
            self.calls[name] = self.roles[name].send(answer)
        except StopIteration as end:
            self.results[name] = end.value

    def land(self, i):
        barrier, slot, tile = self.copies.pop(i)
        if slot.store.readers:
            raise Broken("a copy lands in a slot that is read")
        slot.store.tile = tile
        barrier.bytes -= tile.nbytes
        barrier.settle()

    def end(self, name):
        self.products[name].pop(0).end()


class Steps(ast.NodeTransformer):
    """Makes every call of ``CALLS`` a step: yielded with its arguments, it gets the answer."""

    def visit_Call(self, node):
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name == "copy":
            return ast.YieldFrom(node)
        if name not in CALLS:
            return node
        step = ast.Call(
            ast.Name("a_step", ast.Load()), [ast.Constant(name), *node.args], node.keywords
        )
        return ast.Yield(step)


def source_of(name):
    return textwrap.dedent(inspect.getsource(getattr(kernel, name).fn))


def python_of(source, names):
    """The function of that source, for Python; one that makes calls of ``CALLS`` is a generator."""
    tree = ast.parse(source)
    tree.body[0].decorator_list = []
    exec(compile(ast.fix_missing_locations(Steps().visit(tree)), "role", "exec"), names)


def nothing(*_):
    return None


GLUON = SimpleNamespace(
    NVMMADistributedLayout=nothing,
    SliceLayout=nothing,
    BlockedLayout=nothing,
    DotOperandLayout=nothing,
    float32=torch.float64,
    int32=torch.int32,
    constexpr=None,
    static_range=range,
    convert_layout=lambda x, _: x,
    arange=lambda start, end, layout: torch.arange(start, end),
    full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
    where=torch.where,
    maximum=torch.maximum,
    max=lambda x, dim: x.amax(dim),
    sum=torch.sum,
    exp2=torch.exp2,
)


class Tiles:
    """A tensor map over ``[rows, HEAD_DIM]`` of one sub-sequence; rows behind the last are 0."""

    def __init__(self, rows, shape, sub, width):
        self.rows, self.block = rows, math.prod(shape) // HEAD_DIM
        self.block_type = SimpleNamespace(shape=shape, nbytes=math.prod(shape) * rows.itemsize)
        self.sub, self.width = sub, width

    def read(self, at):
        b, run, sub, offset, column = at
        assert (b, sub, column) == (3, self.sub, 2 * HEAD_DIM)
        first = run * self.width + offset
        assert first % self.block == 0
        tile = torch.zeros(self.block, HEAD_DIM, dtype=self.rows.dtype)
        found = self.rows[first : first + self.block]
        tile[: len(found)] = found
        return tile.reshape(self.block_type.shape)


def rows_at(block, lane, video_blocks, sub, sizes, whole_runs, size):
    """As device.py's, of the one sub-sequence that is played: numbers in it, not of tokens."""
    assert (sub, whole_runs, size) == (1, True, BLOCK)
    is_video = block < video_blocks
    row = (block if is_video else block - video_blocks) * BLOCK + lane
    return is_video, row, row < sizes[0 if is_video else 1]


def attended(mask, is_video, b, sub, key, h, exists):
    (rows, *strides), ours = mask[0 if is_video else 1], key[exists]
    assert (b, sub, h, strides) == (3, 1, 2, [7, 0, 1, 0])
    found = torch.zeros(BLOCK, dtype=torch.bool)
    found[exists] = rows[ours]
    return found


HIDDEN = {  # of so many keys, the video's first: which are attended to
    "a third": lambda keys: torch.arange(keys) % 3 != 0,
    "the first block": lambda keys: torch.arange(keys) >= min(BLOCK, keys - 1),
    "a block in the middle": lambda keys: torch.arange(keys) // BLOCK != 2,
    "the last key alone is seen": lambda keys: torch.arange(keys) == keys - 1,
    "all": lambda keys: torch.zeros(keys, dtype=torch.bool),
}
SCHEDULES = [f"late {who}" for who in (*ROLES, "land", "end")] + [f"drawn {i}" for i in range(20)]


def chooser(schedule):
    """Draws the next move; or what a role could do, or all that could land or end, comes last."""
    kind, what = schedule.split()
    if kind == "drawn":
        return random.Random(int(what)).choice
    return lambda moves: min(moves, key=lambda move: what in move)


def play(schedule, video, text, *, width=2, stages=2, tasks=3, hide=None, change=("", "")):
    """Run the roles over so many keys; the answer of both consumers, and the right one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(video, HEAD_DIM) for _ in "qkv")
    text_q, text_k, text_v = (draw(text, HEAD_DIM) for _ in "qkv")

    def maps(rows, text_rows, block):
        short = min(width, block)
        return (
            Tiles(rows, [1, block // short, 1, short, HEAD_DIM], 1, width),
            Tiles(text_rows, [1, block, 1, 1, HEAD_DIM], 0, 1),
        )

    tiles = maps(q, text_q, ROWS), maps(k, text_k, BLOCK), maps(v, text_v, BLOCK)
    q_box, box = (tiles[i][0].block_type.shape for i in (0, 1))
    slots = tuple(Ring(Slot(box) for _ in range(stages)) for _ in "kv")
    q_slots = Ring(Slot(q_box) for _ in range(2))
    q_slots.shape, q_slots.dtype = [2, *q_box], torch.float64
    barriers = [Ring(Barrier(count) for _ in range(stages)) for count in (1, 1, 2, 2)]
    barriers += (Ring(Barrier(1) for _ in range(2)) for _ in range(3))
    barriers[-1][0].arrive()
    video_blocks = -(-video // BLOCK)
    blocks = video_blocks - (-text // BLOCK)
    counts = video_blocks, blocks, video, text

    names = {"ttgl": GLUON, "a_step": lambda name, *args, **options: (name, args, options)}
    seen, mask = torch.ones(video + text, dtype=torch.bool), None
    if hide is not None:
        seen = HIDDEN[hide](video + text)
        mask = tuple((rows, 7, 99, 1, 99) for rows in (seen[:video], seen[video:]))
    shape = (video, text, 1, width, 1)

    names |= {"rows_at": rows_at, "attended": attended}
    names["task_at"] = lambda task, *_: (torch.tensor(3), torch.tensor(2), 1, task)
    names["kept"] = lambda x: x
    sources = [source_of(name) for name in ("allowed", "attend", "copy", "produce", "softmax")]
    if not any(change[0] in source for source in sources):
        raise LookupError(f"the kernel has no {change[0]!r} any more")
    for source in sources:
        python_of(source.replace(*change) if change[0] else source, names)

    def consume(group):
        """A task for each block of queries, as the kernel's own role takes them."""
        found = []
        for done in range(min(blocks, tasks)):
            answer = yield from names["attend"](
                q_slots, slots, barriers, mask, done, shape, counts, 0.7, done,
                True, HEAD_DIM, BLOCK, stages, group,
            )  # fmt: skip
            found.append(answer)
        return found

    producer = names["produce"](
        tiles, q_slots, slots, barriers, shape,
        (0, min(blocks, tasks), 1, video_blocks, blocks), HEAD_DIM, BLOCK, BLOCK, stages,
    )  # fmt: skip
    roles = {"first": consume(0), "second": consume(1), "producer": producer}
    answers = Machine(roles, chooser(schedule)).run()
    keys, values = torch.cat([k, text_k]), torch.cat([v, text_v])
    for group, name in enumerate(ROLES[:2]):
        for task, (acc, top, total) in enumerate(answers[name]):
            source, block = (q, task) if task < video_blocks else (text_q, task - video_blocks)
            query = source[block * BLOCK + group * ROWS :][:ROWS]
            scores = query @ keys.T * 0.7 * math.log(2)  # the kernel's scale is for powers of two
            scores = scores.masked_fill(~seen, -math.inf)
            rows = len(query)
            total = torch.where(total == 0, 1.0, total)  # as consume does it
            out, lse = acc / total[:, None], (top + total.log2()) * math.log(2)
            weights = scores.softmax(-1) if seen.any() else 0 * seen.to(scores.dtype)
            torch.testing.assert_close(out[:rows], weights.expand(rows, -1) @ values)
            torch.testing.assert_close(lse[:rows], scores.logsumexp(-1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3])
def test_every_schedule_gives_attention(schedule, stages):
    for video, text in ((8, 0), (0, 3), (16, 0), (40, 19), (30, 16), (5, 1), (64, 40)):
        play(schedule, video, text, stages=stages)


@pytest.mark.parametrize("width", [1, 4, 8, 16])
def test_runs_of_any_width(width):
    play("drawn 0", 64, 9, width=width)


@pytest.mark.parametrize("hide", HIDDEN)
def test_keys_are_masked(hide):
    for schedule in SCHEDULES[::3]:
        for video, text in ((5, 1), (40, 19), (64, 0)):
            play(schedule, video, text, hide=hide)


FIRST = "scores = warpgroup_mma_wait(0, [scores])"
FREE_FIRST = "mbarrier.arrive(k_free.index(slot), count=1)"
WAIT_SCORES = "scores = warpgroup_mma_wait(1, [scores])"
WAIT_ACC = "acc, p = warpgroup_mma_wait(0, [acc, p])"
FREE_K = "mbarrier.arrive(k_free.index(slot), count=1)"
FREE_V = "mbarrier.arrive(v_free.index(last), count=1)"
WRONG = {
    "keys freed before they are read": (f"{FIRST}\n    {FREE_FIRST}", f"{FREE_FIRST}; {FIRST}"),
    "values freed before they are read": (f"{WAIT_ACC}\n        {FREE_V}", f"{FREE_V}; {WAIT_ACC}"),
    "scores used too early": (WAIT_SCORES, WAIT_SCORES.replace("1", "2")),
    "keys never freed": (FREE_K, "pass"),
    "values never freed": (FREE_V, "pass"),
    "keys freed twice": (FREE_K, f"{FREE_K}; {FREE_K}"),
    "the first lap waits": ("lap ^ 1", "lap"),
    "keys copied into a slot in use": ("mbarrier.wait(k_free.index(slot), lap ^ 1)", "pass"),
    "values copied into a slot in use": ("mbarrier.wait(v_free.index(slot), lap ^ 1)", "pass"),
    "values read before they are there": ("(before + i - 1) // STAGES & 1)", "1)"),
    "keys read before they are there": (
        "mbarrier.wait(k_ready.index(slot), (before + i) // STAGES & 1)",
        "pass",
    ),
    "the turn is kept": ("turn.index(1 - GROUP)", "turn.index(GROUP)"),
    "too few bytes": ("video.block_type.nbytes", "video.block_type.nbytes // 2"),
    "queries read before they are there": ("mbarrier.wait(q_ready.index(GROUP), done & 1)", "pass"),
    "queries copied into a slot in use": (
        "mbarrier.wait(q_free.index(group), done & 1 ^ 1)",
        "pass",
    ),
    "queries never freed": ("mbarrier.arrive(q_free.index(GROUP), count=1)", "pass"),
    "every task begins at the first slot": ("before = done * blocks", "before = 0"),
    "the last values of a task never freed": (
        "acc = warpgroup_mma_wait(0, [acc])\n    mbarrier.arrive(v_free.index(last), count=1)",
        "acc = warpgroup_mma_wait(0, [acc])",
    ),
}


@pytest.mark.parametrize("slip", WRONG)
def test_the_model_sees_what_is_wrong(slip):
    def every_schedule():
        for schedule in SCHEDULES:
            for text in (9, 19):  # 7 blocks and 8: tasks begin at either slot, or in either phase
                play(schedule, 40, text, change=WRONG[slip])

    with pytest.raises((Broken, AssertionError)):
        every_schedule()


WRONG_MASKS = {
    "the mask of the block before": ("= allowed(mask, task, i, ", "= allowed(mask, task, i - 1, "),
    "the first block is seen whole": (
        "softmax(scores, at_first, kept(0)",
        "softmax(scores, None, kept(0)",
    ),
    "no key yet is not minded": ('ttgl.where(new_top == -float("inf"), 0.0, new_top)', "new_top"),
    "masked keys weigh a little": (
        'ttgl.where(attend[None, :], scores, -float("inf"))',
        "ttgl.where(attend[None, :], scores, -9.0)",
    ),
}


@pytest.mark.parametrize("slip", WRONG_MASKS)
def test_the_model_sees_wrong_masks(slip):
    def every_mask():
        for hide in HIDDEN:
            play("drawn 0", 40, 19, hide=hide, change=WRONG_MASKS[slip])

    with pytest.raises(AssertionError):
        every_mask()


SINGLE = SkipPattern.single(4)


def reason(p=SINGLE, *, shape=(2, 64, 3, 128), T=5, masked=False, dtype=torch.bfloat16, scale=0.1):
    with FakeTensorMode():
        video, text = (torch.empty(shape[0], n, *shape[2:], dtype=dtype, device="cuda")
                       for n in (shape[1], T))  # fmt: skip
        mask = torch.ones(shape[:2], dtype=torch.bool, device="cuda") if masked else None
        return pingpong.why_not(Inputs(video, video, video, text, text, text, mask, None, p, scale))


def test_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert pingpong.why_not() is None
    for p in (SkipPattern.dense(), SkipPattern.single(4), SkipPattern.group(4)):
        assert reason(p) is None
    assert reason(T=0) is None
    assert reason(dtype=torch.float16, shape=(2, 64, 3, 64)) is None
    assert reason(masked=True) is None
    assert "fp16 and bf16, not torch.float32" in reason(dtype=torch.float32)
    assert "(64, 128), not 32" in reason(shape=(2, 64, 3, 32))
    assert "positive scale, not -0.1" in reason(scale=-0.1)
    assert "positive scale, not 0.0" in reason(scale=0.0)
    assert "positive scale, not 1e-50" in reason(scale=1e-50)  # 0 in fp32
    for odd in (SkipPattern(2, 3), SkipPattern(4, 24)):
        assert "no boxes" in reason(odd, shape=(2, 96, 3, 128))
    assert "no boxes" in reason(shape=(2, 63, 3, 128))
    assert "no boxes" in reason(shape=(0, 64, 3, 128))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert "capability 9.0" in pingpong.why_not()
    assert "capability 9.0" in reason()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "does not run Gluon" in pingpong.why_not()
    monkeypatch.setattr(module, "__version__", "3.9.0")
    assert "Triton 3.6 and 3.7, not 3.9.0" in pingpong.why_not()


def test_a_nightly_of_triton_says_its_release_itself(monkeypatch):
    """Its distribution is not called triton."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(module, "__version__", "3.6.0+git9844da95")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert pingpong.why_not() is None
