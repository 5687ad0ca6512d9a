"""Models told of images begin as those of text alone, are told what is known, and sample by it."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel

from skiparse.models import flow
from skiparse.models.data.draws import Place, Use, numbers
from skiparse.models.data.features import Features, collate
from skiparse.models.image_wan import ImageWan
from skiparse.models.images import (
    KINDS,
    SHARE,
    Guide,
    Images,
    KnownFrames,
    Pictures,
    drawn,
    frames_known,
    high_pass,
    weights_of_ends,
)
from skiparse.models.retrofit import Retrofit, retrofit
from skiparse.models.suv.model import SUV

C, GRID = 4, (3, 8, 8)  # of latents
PARADIGMS = ["flash", "mask"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomised(model, seed=0):
    """With every weight drawn anew, so that nothing is 0."""
    noise = generator(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=noise)
    return model.eval()


def inputs(seed=0):
    """Noisy latents, times, text and its pooled embedding."""
    shapes = ((2, C, *GRID), (2, 7, 24), (2, 20))
    noisy, text, pooled = (torch.randn(s, generator=generator(seed + i)) for i, s in
                           enumerate(shapes))  # fmt: skip
    return noisy, torch.tensor([250.0, 900.0]), text, pooled


def known(paradigm="flash", seed=5):
    """One sample with its first frame, one with both ends, or with the middle where that may be."""
    latents = torch.randn(2, C, *GRID, generator=generator(seed))
    rows = [[1, 0, 0], [1, 0, 1] if paradigm == "flash" else [0, 1, 1]]
    which = torch.tensor(rows, dtype=torch.bool)
    return KnownFrames(latents * which[:, None, :, None, None], which, torch.tensor([0.1, 0.6]))


# What is known.


def magnitudes_left(frame, share):
    """The same written out in fp64, frequency by frequency, for [C, h, w]."""
    spectrum = np.fft.fftshift(np.fft.fft2(frame.double().numpy()), (-2, -1))
    _, h, w = spectrum.shape
    places = list(itertools.product(range(h), range(w)))
    radius = {(y, x): ((y - h // 2) ** 2 + (x - w // 2) ** 2) ** 0.5 for y, x in places}
    magnitude = np.abs(spectrum).mean(0)
    total, so_far = magnitude.sum(), 0.0
    for place in sorted(places, key=radius.get):
        so_far += magnitude[place]
        if so_far >= share * total:
            break
    for y, x in places:
        if radius[y, x] < radius[place]:
            spectrum[:, y, x] = 0
    return torch.from_numpy(np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum, (-2, -1)))))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (6, 9), (1, 4)])
def test_frequencies_are_left_out_up_to_their_share(size):
    latents = torch.randn(2, C, 2, *size, generator=generator())
    for shares in ([0.0, 0.1], [0.5, 0.95]):
        found = high_pass(latents, torch.tensor(shares))
        for b, n in itertools.product(range(2), range(2)):
            wanted = magnitudes_left(latents[b, :, n], np.float32(shares[b]))
            torch.testing.assert_close(found[b, :, n].double(), wanted, rtol=0, atol=1e-5)
    even = torch.ones(1, C, 1, *size)  # all of whose magnitude is in the middle
    assert torch.equal(high_pass(even, torch.tensor([0.5])), even)


def test_of_two_ends_one_gives_way_to_the_other():
    which = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    found = weights_of_ends(which)
    assert found[0].tolist() == [[1.0] * 5, [0.0] * 5]
    assert found[1].tolist() == [[1.0, 0.75, 0.5, 0.25, 0.0], [0.0, 0.25, 0.5, 0.75, 1.0]]
    assert not found[2].any()
    assert weights_of_ends(torch.ones(1, 1, dtype=torch.bool)).tolist() == [[[1.0], [0.0]]]


@pytest.mark.parametrize("kind", KINDS["mask"])
def test_what_each_kind_of_mask_shows(kind):
    every = [frames_known(kind, 4, numbers(0, i, 0, Use.IMAGES)) for i in range(200)]
    found = {"".join("x" if x else "." for x in each.tolist()) for each in every}
    two_or_less = ("".join(x) for x in itertools.product("x.", repeat=4))
    assert (
        found
        == {
            "none": {"...."},
            "first": {"x..."},
            "ends": {"x..x"},
            "start": {"x...", "xx..", "xxx."},
            "some": {x for x in two_or_less if 0 < x.count("x") < 4},
            "all": {"xxxx"},
        }[kind]
    )
    assert not frames_known(kind, 1, numbers(0, 0, 0, Use.IMAGES)).any()


def test_kinds_come_as_often_as_their_shares_say():
    mean, last = torch.ones(C, *GRID), torch.full((C, 1, *GRID[1:]), 7.0)
    images = Images(paradigm="mask", kinds={"none": 0.5, "first": 0.3, "ends": 0.2})
    counts = {0: 0, 1: 0, 2: 0}
    shares = []
    for i in range(600):
        found = drawn(images, mean, last, numbers(3, i, 0, Use.IMAGES))
        number = int(found.known.sum())
        counts[number] += 1
        shares.append(found.share.item())
        assert torch.equal(found.latents[:, -1:], last if number == 2 else 0 * last)
        assert (found.latents[:, 0] == float(number > 0)).all()
    for number, share in ((0, 0.5), (1, 0.3), (2, 0.2)):  # five standard deviations
        assert abs(counts[number] / 600 - share) < 5 * (share * (1 - share) / 600) ** 0.5
    assert 0.05 <= min(shares) < 0.06
    assert 0.94 < max(shares) <= 0.95
    with pytest.raises(ValueError, match="the features have no last frames; build the cache"):
        drawn(Images(kinds={"ends": 1.0}), mean, None, numbers(0, 0, 0, Use.IMAGES))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"paradigm": "concat"}, "images must be one of flash, mask, got 'concat'"),
        ({"kinds": {"start": 1.0}}, "images.kinds has start; with flash there are none, first, en"),
        ({"paradigm": "mask", "kinds": {"second": 1.0}}, "images.kinds has second; with mask"),
        ({"kinds": {"first": 0.5}}, "that add up to 1, got"),
        ({"kinds": {"first": 1.5, "none": -0.5}}, "shares from 0 to 1"),
        ({"kinds": {}}, "that add up to 1, got"),
    ],
)
def test_settings_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        Images(**given)


# Models.


def suv(**changes):
    torch.manual_seed(0)
    return SUV(**SUV.presets["tiny"] | {"in_channels": C, "out_channels": C} | changes)


def wan(in_channels=C):
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=in_channels, out_channels=C,
        text_dim=24, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip


class OfSUV:
    """What the tests do with an SUV."""

    @staticmethod
    def told(paradigm):
        model = randomised(suv())
        before = {name: x.clone() for name, x in model.state_dict().items()}
        text = suv()
        text.load_state_dict(before)
        model.take_images(paradigm, seed=3)
        return text.eval(), model

    wide = staticmethod(lambda channels: suv(in_channels=channels))
    patches = "patch_embed"

    @staticmethod
    def embedding(model):
        return model.guide_embed

    @staticmethod
    def call(model, noisy, times, text, pooled, images=None):
        told = {} if images is None else {"images": images}
        return model(noisy, times, text, pooled, **told)


class OfWan:
    """What they do with a Wan."""

    sparse = False

    @classmethod
    def told(cls, paradigm):
        text = randomised(wan())
        told = randomised(wan())  # of the same numbers
        told = ImageWan.of(told, paradigm, seed=3)
        return cls._made(text), cls._made(told)

    @classmethod
    def _made(cls, model):
        if cls.sparse:
            retrofit(model, "2d", ratio=2, kinds=("dense", "single", "group"))
        return model

    @classmethod
    def wide(cls, channels):
        return cls._made(wan(channels))

    patches = "patch_embedding"

    @staticmethod
    def embedding(model):
        return model.patch_embedding.beside

    @staticmethod
    def call(model, noisy, times, text, pooled, images=None):
        told = {} if images is None else {"images": images}
        return model(noisy, times, text, return_dict=False, **told)[0]


class OfSparseWan(OfWan):
    """What they do with one that is retrofitted."""

    sparse = True


MODELS = [OfSUV, OfWan, OfSparseWan]


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("of", MODELS)
def test_it_begins_as_the_model_of_text_to_the_bit(of, paradigm):
    """With images and without; and what begins at 0 learns from the first step on."""
    text, told = of.told(paradigm)
    wanted = of.call(text, *inputs())
    assert torch.equal(of.call(told, *inputs()), wanted)
    found = of.call(told, *inputs(), known(paradigm))
    assert torch.equal(found, wanted)
    found.square().mean().backward()
    own = {name for name, _ in text.named_parameters()}
    new = {name: x for name, x in told.named_parameters() if name not in own}
    zero = {name for name, x in new.items() if not x.any() and "weight" in name}
    assert len(zero) == (2 if paradigm == "flash" else 1)
    assert all(new[name].grad.abs().max() > 0 for name in zero)
    assert own < {name for name, _ in told.named_parameters()}


def begun(kind, seed, dtype=torch.float32):
    """A model in evaluation that was just told of images; nothing else draws numbers then."""
    made = (suv if kind == "suv" else wan)().to(dtype).eval()
    before = torch.get_rng_state()
    if kind == "suv":
        made.take_images("flash", seed=seed)
    else:
        made.register_to_config(skiparse={"kept": 1})
        made = ImageWan.of(made, "flash", seed=seed)
        assert made.config.skiparse == {"kept": 1}
    assert torch.equal(torch.get_rng_state(), before)
    return made


@pytest.mark.parametrize("kind", ["suv", "wan"])
def test_new_weights_follow_their_seed(kind):
    """They are of the model's dtype, and in its mode."""
    one, same, other = (begun(kind, seed) for seed in (3, 3, 4))
    for name, x in one.guide.named_parameters():
        assert torch.equal(same.guide.get_parameter(name), x)
        assert torch.equal(other.guide.get_parameter(name), x) == (not x.any())
    half = begun(kind, 3, torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in half.modules())


def test_what_is_known_follows_the_seed_and_the_place():
    """As the numbers that are for it alone."""
    images = Images(paradigm="mask", kinds={"some": 1.0})
    latents = torch.randn(C, 9, 2, 2, generator=generator())
    text = {"pooled": torch.zeros(3)}
    places = [Place(*x, 0) for x in ((0, 0), (0, 1), (1, 0), (7, 3))]
    every = [Features(latents, latents, (text,), text, "k", place) for place in places]
    for seed in (0, 5):
        found = collate(every, seed=seed, drop=0.0, images=images).images
        for number, (step, index, _) in enumerate(places):
            wanted = drawn(images, latents, None, numbers(seed, step, index, Use.IMAGES))
            for x, its in zip(found, wanted, strict=True):
                assert torch.equal(x[number], its)


@torch.no_grad()
@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("of", MODELS)
def test_it_is_the_model_with_so_many_more_channels(of, paradigm):
    """What the paradigms say, written out for a model that gets everything as latents."""
    _, told = of.told(paradigm)
    for module in (told.guide, of.embedding(told)):
        randomised(module, 8)
    noisy, *rest = inputs()
    images = known(paradigm)
    own, beside = getattr(told, of.patches), of.embedding(told)
    if paradigm == "mask":
        mask = images.known[:, None, :, None, None].expand(2, 1, *GRID).float()
        given, weight, bias = [noisy, mask, images.latents], beside.weight, 0
    else:
        first, second = images.latents[:, :, :1], images.latents[:, :, 2:]
        late = torch.tensor([[0.0] * 3, [0.0, 0.5, 1.0]])[:, None, :, None, None]
        shift = told.guide.shift
        ours = [
            (1 - late) * f(first) + late * f(second)
            for f in (shift, lambda x: high_pass(x, images.share))
        ]
        given = [noisy - ours[0], ours[1]]
        patches, last = beside
        mix = last.weight[:, :, 0, 0, 0]
        weight = torch.einsum("oi,icthw->octhw", mix, patches.weight)
        bias = mix @ patches.bias + last.bias
    wide = of.wide(sum(x.shape[1] for x in given))
    state = {name: x for name, x in told.state_dict().items() if name in wide.state_dict()}
    both = torch.cat([own.weight.flatten(2), weight.flatten(2)], 1)
    state[f"{of.patches}.weight"] = both.view_as(wide.get_parameter(f"{of.patches}.weight"))
    state[f"{of.patches}.bias"] = own.bias + bias
    wide.load_state_dict(state, strict=True)
    wanted = of.call(wide.eval(), torch.cat(given, 1), *rest)
    found = of.call(told, noisy, *rest, images)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    other = of.call(told, noisy, *rest)
    assert (other - wanted).abs().max() > 0.01 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("of", [OfSUV, OfWan])
def test_nothing_known_is_text_alone(of):
    """Also where the network of shifts has learnt to add something of its own."""
    _, told = of.told("flash")
    randomised(told.guide, 8)
    torch.nn.init.zeros_(of.embedding(told)[-1].bias)
    images = known()
    nothing = KnownFrames(0 * images.latents, images.known & False, images.share)
    assert torch.equal(of.call(told, *inputs(), nothing), of.call(told, *inputs()))


@torch.no_grad()
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_what_is_not_known_is_not_seen(paradigm):
    """Whatever stands there."""
    guide, (noisy, *_), images = randomised(Guide(paradigm, C), 8), inputs(), known(paradigm)
    there = torch.randn(images.latents.shape, generator=generator(7))
    hidden = ~images.known[:, None, :, None, None] * there
    whole = images._replace(latents=images.latents + hidden)
    assert torch.equal(guide(noisy, whole), guide(noisy, images))


@torch.no_grad()
def test_the_shift_is_in_fp32_in_a_model_of_half_precision():
    _, told = OfSUV.told("flash")
    randomised(told.guide, 8)
    images, (noisy, *_) = known(), inputs()
    whole = told.guide(noisy, images)
    half = told.guide.to(torch.bfloat16)
    wanted = Guide("flash", C)
    wanted.load_state_dict({name: x.float() for name, x in half.state_dict().items()})
    right = wanted(noisy, images)
    assert torch.equal(half(noisy, images), right)
    assert half(noisy, images).dtype == whole.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(noisy, images), right)


@torch.no_grad()
def test_what_goes_in_is_one_graph():
    """Of whole models: tests/test_together.py."""
    torch._dynamo.reset()
    guide, (noisy, *_) = randomised(Guide("flash", C), 8), inputs()
    compiled = torch.compile(guide, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(noisy, known()), guide(noisy, known()))


@torch.no_grad()
def test_tokens_in_any_order_get_their_own_frames():
    _, told = OfSUV.told("flash")
    for module in (told.guide, told.guide_embed):
        randomised(module, 8)
    found = told(*inputs(), images=known())
    wanted = told(*inputs(), images=known(), reorder=False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_saved_models_come_back(tmp_path, paradigm):
    _, told = OfSUV.told(paradigm)
    randomised(told)
    told.save_pretrained(tmp_path / "suv")
    again = SUV.from_pretrained(tmp_path / "suv")
    assert again.config.images == paradigm
    assert torch.equal(
        again(*inputs(), images=known(paradigm)), told(*inputs(), images=known(paradigm))
    )
    dense = SUV.from_dense(told, sparsity=told.config.sparsity)
    assert torch.equal(
        dense(*inputs(), images=known(paradigm)), told(*inputs(), images=known(paradigm))
    )
    _, told = OfSparseWan.told(paradigm)
    randomised(told)
    told.save_pretrained(tmp_path / "wan")
    again = ImageWan.from_pretrained(tmp_path / "wan")
    retrofit(again)
    assert Retrofit.of(again).sparsity == Retrofit.of(told).sparsity
    found, wanted = (OfWan.call(x, *inputs(), known(paradigm)) for x in (again, told))
    assert torch.equal(found, wanted)


def test_what_does_not_fit_is_refused():
    text, told = OfSUV.told("flash")
    images, given = known(), inputs()
    with pytest.raises(ValueError, match="this SUV is told of text alone; train one with images"):
        text(*given, images=images)
    with pytest.raises(ValueError, match="this SUV is told of images already, by 'flash'"):
        told.take_images("mask")
    with pytest.raises(ValueError, match="images must be one of flash, mask, got 'both'"):
        text.take_images("both")
    assert text.config.images is None
    less = images._replace(latents=images.latents[:, :, :2])
    with pytest.raises(
        ValueError, match=r"images.latents must be \[2, 4, 3, 8, 8\], got \[2, 4, 2"
    ):
        told(*given, images=less)
    with pytest.raises(ValueError, match=r"images.known must be \[2, 3\], got \[2, 2\]"):
        told(*given, images=images._replace(known=images.known[:, :2]))
    sparse = wan()
    retrofit(sparse)
    with pytest.raises(ValueError, match="this Wan is retrofitted; undo"):
        ImageWan.of(sparse, "flash")
    with pytest.raises(ValueError, match="a Wan that takes images by itself"):
        ImageWan.of(wan(2 * C), "flash")


# Sampling.


@torch.no_grad()
def test_a_known_path_is_inverted():
    """With the true velocity of one video, as a model sees it, in both ways of integrating.

    The model sees shifted latents ``z`` and may know of where they go, ``x0 - s``; of all it could
    see on the way there the velocity is ``(z - (x0 - s)) / sigma``.
    """
    guide = randomised(Guide("flash", C), 8).double()
    images = known()
    x0, noise = (torch.randn(2, C, *GRID, generator=generator(i)).double() for i in (1, 2))
    shift = (noise.float() - guide(noise, images)[:, :C]).double()
    assert shift.abs().mean() > 0.1
    sigmas = flow.inference_sigmas(8).double()

    def velocity(shifted, sigma):
        return (shifted - (x0 - shift)) / sigma

    inside = noise  # the shift is a part of the model, as here and in the release
    for sigma, after in itertools.pairwise(sigmas):
        inside = inside + (after - sigma) * velocity(inside - shift, sigma)
    outside = noise - shift  # the path itself is shifted, and back at its end
    for sigma, after in itertools.pairwise(sigmas):
        outside = outside + (after - sigma) * velocity(outside, sigma)
    torch.testing.assert_close(inside, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(outside + shift, x0, rtol=0, atol=1e-12)
    assert (outside - x0).abs().mean() > 0.1  # without the shift at its end


@torch.no_grad()
@pytest.mark.parametrize("of", [OfSUV, OfSparseWan])
def test_both_ways_to_sample_arrive_at_the_same(of):
    """Steps of our models, which shift inside, and steps along the shifted path by the formulas."""
    _, told = of.told("flash")
    for module in (told.guide, of.embedding(told)):
        randomised(module, 8)
    images, (noise, _, *text) = known(), inputs()
    shift = noise - told.guide(noise, images)[:, :C]
    assert shift.abs().mean() > 0.1

    def steps(x, shifted):
        for sigma, after in itertools.pairwise(flow.inference_sigmas(4)):
            at = x + shift if shifted else x  # what the model shifts itself
            velocity = of.call(told, at, flow.timesteps(sigma.expand(2)), *text, images)
            x = flow.euler_step(x, velocity, sigma, after)
        return x + shift if shifted else x

    found, wanted = steps(noise, False), steps(noise - shift, True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
def test_the_loss_is_that_of_the_shifted_path():
    """Noise and data are shifted alike, so what is to be learnt stays what it was."""
    _, told = OfSUV.told("flash")
    randomised(told.guide, 8)
    images, (x0, times, *_) = known(), inputs()
    noise, sigmas = torch.randn(x0.shape, generator=generator(9)), times / 1000
    shift = x0 - told.guide(x0, images)[:, :C]
    noisy = flow.add_noise(x0, noise, sigmas)
    seen = told.guide(noisy, images)[:, :C]
    path = flow.add_noise(x0 - shift, noise - shift, sigmas)
    torch.testing.assert_close(seen, path, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        flow.velocity(x0 - shift, noise - shift), flow.velocity(x0, noise), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None, "last_image": torch.zeros(32, 48, 3).byte()}, "last_image goes with imag"),
        ({"frames": 1}, "image is the first frame of several; give more than num_frames=1"),
        ({"image": torch.zeros(16, 48, 3).byte()}, "image is 16x48, but the video 32x48; cut and"),
        ({"image": torch.zeros(32, 48, 3)}, r"image must be uint8 \[height, width, 3\], got torch"),
        ({"image": torch.zeros(3, 32, 48).byte()}, r"got torch.uint8 of \[3, 32, 48\]"),
        ({"image": "cat.png"}, "image must be a PIL image or uint8 .*, got a str"),
        ({"image": [torch.zeros(32, 48, 3).byte()] * 3}, "image: 3 images for 4 videos; give one"),
        ({"last_image": torch.zeros(32, 47, 3).byte()}, "last_image is 32x47, but the video 32x48"),
    ],
)
def test_images_of_another_kind_are_refused(given, message):
    fits = {"image": torch.zeros(32, 48, 3).byte(), "last_image": None, "height": 32, "width": 48,
            "frames": 9, "videos": 4}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Pictures.of(**fits | given)


def test_images_are_repeated_for_the_videos_of_their_prompts():
    first, second = (torch.full((32, 48, 3), x, dtype=torch.uint8) for x in (1, 2))
    found = Pictures.of([first, second.numpy()], None, height=32, width=48, frames=9, videos=4)
    assert found.first[:, 0, 0, 0].tolist() == [1, 1, 2, 2]
    assert found.last is None
    assert SHARE == 0.1  # of the release, in sampling
