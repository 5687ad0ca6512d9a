"""Features of a clip depend on nothing else; what is random in a batch follows from its places."""

import itertools
import re
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("transformers")

from test_text import save, tiny_encoders  # after the check for the extra

from skiparse.models.data.draws import Place, Use, numbers, stage_seed, torch_numbers
from skiparse.models.data.features import Features, collate, digest
from skiparse.models.suv.encoders import Encoders
from skiparse.models.text import TextEncoders
from skiparse.models.wfvae.model import WFVAE

VAE = {
    "base_channels": 4,
    "latent_channels": 4,
    "encoder_energy_channels": 4,
    "decoder_energy_channels": 4,
    "encoder_res_blocks": 1,
    "decoder_res_blocks": 1,
    "shift": (0.5, -1.0, 0.0, 2.0),
    "scale": (2.0, 0.5, 1.5, 1.0),
}
FIRST = Place(0, 0, 0)


@dataclass(frozen=True)
class Clip:
    """As a data set gives it."""

    frames: torch.Tensor
    captions: tuple[str, ...]
    key: str
    place: Place


def tiny_vae(seed=0):
    torch.manual_seed(seed)
    return WFVAE(**VAE)


def clip(row=0, frames=9, captions=("a red kite", "a kite over the sea")):
    generator = torch.Generator().manual_seed(row)
    pixels = torch.randint(256, (frames, 16, 24, 3), dtype=torch.uint8, generator=generator)
    return Clip(pixels, captions, f"clips/{row}.mp4", Place(0, row, row))


def feature(place=FIRST, length=3, shape=(2, 2, 2, 2)):
    """Made by hand: the caption's number is its value, that of no caption -1."""
    texts = tuple(
        {"states": torch.full((length + i, 3), float(i)), "pooled": torch.full((2,), float(i))}
        for i in range(3)
    )
    null = {"states": -torch.ones(1, 3), "pooled": -torch.ones(2)}
    return Features(torch.zeros(shape), torch.ones(shape), texts, null, "made", place)


def same(a, b):
    """Bit for bit, all of two features."""
    pairs = [(a.mean, b.mean), (a.std, b.std)]
    for x, y in zip((*a.texts, a.null), (*b.texts, b.null), strict=True):
        pairs += [(x["states"], y["states"]), (x["pooled"], y["pooled"])]
    return (a.key, a.place) == (b.key, b.place) and all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def encoders():
    return Encoders(tiny_vae(), TextEncoders(*tiny_encoders()))


def test_latents_are_the_normalised_posterior(encoders):
    given, vae = clip(), encoders.vae
    found = encoders.features(given)
    video = given.frames.movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(video, chunk_frames=8).latent_dist
    assert found.mean.shape == found.std.shape == (4, 2, 2, 3)
    assert torch.equal(found.mean, vae.normalize(posterior.mean)[0])
    scale = torch.tensor(VAE["scale"]).view(4, 1, 1, 1)
    assert torch.equal(found.std, posterior.std[0] * scale)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    sample = vae.normalize(posterior.sample(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(found.mean[None] + found.std[None] * noise, sample)


def test_texts_are_those_of_the_encoders_without_padding(encoders):
    captions = ("A red  KITE", "rain at sea", "\u732b", "")
    found = encoders.features(clip(captions=captions))
    expected = encoders.text.encode(["a red kite", "rain at sea", "", ""])
    assert [len(text["states"]) for text in found.texts] == [11, 12, 1, 1]
    for text, states, mask, pooled in zip(
        found.texts, expected.text, expected.text_mask, expected.pooled, strict=True
    ):
        assert torch.equal(text["states"], states[mask])
        assert torch.equal(text["pooled"], pooled)
    for text in found.texts[2:]:
        assert torch.equal(text["states"], found.null["states"])
        assert torch.equal(text["pooled"], found.null["pooled"])


def test_features_do_not_depend_on_what_came_before(encoders):
    first = encoders.features(clip(1))
    encoders.features(clip(2, frames=17))
    assert same(first, encoders.features(clip(1)))
    fresh = Encoders(tiny_vae(), TextEncoders(*tiny_encoders()))
    assert same(first, fresh.features(clip(1)))
    assert not any(x.requires_grad for x in (first.mean, first.std, first.null["states"]))


def test_the_encoders_remember_no_captions(encoders):
    before = dict(encoders.text._cache)
    encoders.features(clip(captions=("never seen before",)))
    assert encoders.text._cache.keys() == before.keys()


def test_loading(tmp_path, encoders):
    encoders.vae.save_pretrained(tmp_path / "vae")
    save(tmp_path / "text", tiny_encoders())
    loaded = Encoders.from_pretrained(tmp_path / "vae", tmp_path / "text")
    assert same(loaded.features(clip()), encoders.features(clip()))
    assert loaded.fingerprints() == encoders.fingerprints()
    half = Encoders.from_pretrained(tmp_path / "vae", tmp_path / "text", dtype=torch.bfloat16)
    found = half.features(clip())
    for x in (found.mean, found.std, found.texts[0]["states"], found.null["pooled"]):
        assert x.dtype == torch.float32
    changed = {
        name for name, value in half.fingerprints().items() if value != loaded.fingerprints()[name]
    }
    assert changed == {"vae", "t5", "clip"}
    gone = TextEncoders(*tiny_encoders())
    gone.free()
    with pytest.raises(ValueError, match="let go of its encoders"):
        Encoders(tiny_vae(), gone)


def test_fingerprints_tell_what_was_changed(encoders):
    before = encoders.fingerprints()
    encoders.text.tokenizer("cut here", max_length=3, truncation=True)
    assert encoders.fingerprints() == before

    def changed(change):
        other = Encoders(tiny_vae(), TextEncoders(*tiny_encoders()))
        change(other)
        return {name for name, value in other.fingerprints().items() if value != before[name]}

    assert changed(lambda other: None) == set()
    assert changed(lambda e: next(e.vae.parameters()).view(-1)[:1].add_(1)) == {"vae"}
    assert changed(lambda e: e.vae.register_to_config(scale=(1.0,) * 4)) == {"vae"}
    assert changed(lambda e: next(e.text.encoder.parameters()).view(-1)[:1].add_(1)) == {"t5"}
    assert changed(lambda e: setattr(e.text.encoder_2.config, "eos_token_id", 2)) == {"clip"}
    assert changed(lambda e: e.text.tokenizer.add_tokens("kite")) == {"t5"}


def test_numbers_that_are_not_finite_are_refused(encoders):
    broken = Encoders(tiny_vae(), encoders.text)
    broken.vae.encoder.conv_out.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"clips/0.mp4: the autoencoder in torch.float32 gives"):
        broken.features(clip())


def test_a_batch(encoders):
    made = [encoders.features(clip(row)) for row in range(3)]
    batch = collate(made, seed=5, drop=0.5)
    assert batch.latents.shape == (3, 4, 2, 2, 3)
    assert batch.captions.keys() == {"states", "states_mask", "pooled"}
    states, mask, pooled = (batch.captions[name] for name in ("states", "states_mask", "pooled"))
    assert batch.latents.dtype == states.dtype == pooled.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert states.shape == (3, mask.sum(1).max(), 24)
    assert not states[~mask].any()
    assert batch.places == [each.place for each in made]
    assert batch.keys == ["clips/0.mp4", "clips/1.mp4", "clips/2.mp4"]
    for each, row, kept, value in zip(made, states, mask, pooled, strict=True):
        (chosen,) = (t for t in (*each.texts, each.null) if torch.equal(t["pooled"], value))
        assert torch.equal(chosen["states"], row[kept])
    moved = batch.to("meta")
    assert {x.device.type for x in (moved.latents, *moved.captions.values())} == {"meta"}
    assert moved.keys == batch.keys


def test_a_sample_draws_the_same_in_any_batch():
    made = [feature(Place(7, index, 0)) for index in range(4)]
    whole = collate(made, seed=1, drop=0.3)
    parts = [collate(made[i : i + 2], seed=1, drop=0.3) for i in (0, 2)]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    pooled = [part.captions["pooled"] for part in parts]
    assert torch.equal(whole.captions["pooled"], torch.cat(pooled))
    for other in (
        collate(made, seed=2, drop=0.3),
        collate([replace(x, place=x.place._replace(step=8)) for x in made], seed=1, drop=0.3),
    ):
        assert not torch.equal(whole.latents, other.latents)
    assert len({row.flatten()[0].item() for row in whole.latents}) == 4


def test_numbers_for_different_uses_never_meet():
    """Nor those of another seed, step or place."""
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    given = [(*place, use) for place in places for use in Use.__members__.values()]
    assert len({numbers(*each).random() for each in given}) == len(given) == 44
    drawn = {torch.rand((), generator=torch_numbers(*each)).item() for each in given}
    assert len(drawn) == len(given)
    seeds = {int(numbers(*each).integers(2**63)) for each in given}
    assert seeds == {torch_numbers(*each).initial_seed() for each in given}
    assert len({stage_seed(seed, stage) for seed in range(3) for stage in range(3)}) == 9


def test_latents_are_the_mean_or_samples_of_the_posterior():
    made = [
        replace(feature(Place(0, i, 0)), mean=torch.full((2, 2, 2, 2), 3.0),
                std=torch.full((2, 2, 2, 2), 0.5))
        for i in range(1000)
    ]  # fmt: skip
    assert (collate(made, seed=0, drop=0, mode="mean").latents == 3).all()
    drawn = collate(made, seed=0, drop=0).latents.double()
    error = 0.5 / drawn.numel() ** 0.5  # one standard error of the mean
    assert abs(drawn.mean() - 3) < 4 * error
    assert abs(drawn.std() - 0.5) < 4 * error / 2**0.5


def test_captions_are_chosen_and_dropped_as_often_as_they_should():
    count, drop = 10_000, 0.1
    made = [feature(Place(step, index, 0)) for step in range(100) for index in range(100)]
    batch = collate(made, seed=3, drop=drop)
    states, pooled = batch.captions["states"], batch.captions["pooled"]
    values = pooled[:, 0].long()
    assert torch.equal(pooled[:, 0], states[:, 0, 0])  # one coin for both encoders
    for value, share in ((-1, drop), *((i, (1 - drop) / 3) for i in range(3))):
        error = (count * share * (1 - share)) ** 0.5
        assert abs((values == value).sum() - count * share) < 4 * error
    for value, (step, index, _) in zip(values.tolist()[:300], batch.places, strict=False):
        dropped = numbers(3, step, index, Use.DROP).random() < drop
        choice = numbers(3, step, index, Use.CAPTION).integers(3)  # of a stream of its own
        assert value == (-1 if dropped else choice)
    pairs = list(itertools.pairwise((values == -1).tolist()))
    assert sum(a and b for a, b in pairs) < 2 * count * drop**2  # neighbours drop independently
    assert (collate(made[:100], seed=3, drop=0).captions["pooled"] >= 0).all()
    assert (collate(made[:100], seed=3, drop=1).captions["pooled"] == -1).all()


def test_what_collate_refuses():
    for drop in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"drop must be in [0, 1], got {drop}")):
            collate([feature()], seed=0, drop=drop)
    with pytest.raises(ValueError, match="mode must be one of sample, mean, got 'mode'"):
        collate([feature()], seed=0, drop=0, mode="mode")
    with pytest.raises(ValueError, match="one shape, got none at all"):
        collate([], seed=0, drop=0)
    with pytest.raises(ValueError, match=r"got \[\(2, 1, 2, 2\), \(2, 2, 2, 2\)\]"):
        collate([feature(), feature(shape=(2, 1, 2, 2))], seed=0, drop=0)


def test_a_digest_sees_names_dtypes_shapes_and_bytes():
    x = torch.arange(6.0)
    one = digest({"a": x, "b": x})
    assert digest({"b": x, "a": x}) == one
    others = [{"a": x}, {"a": x, "c": x}, {"a": x, "b": x + 1}, {"a": x, "b": x.view(2, 3)},
              {"a": x, "b": x.view(torch.int32)}]  # fmt: skip
    assert len({one, *map(digest, others)}) == 6
    assert digest({"a": x.view(2, 3).T}) == digest({"a": x.view(2, 3).T.contiguous()})
    assert digest({"a": x.bfloat16()}) != digest({"a": x.half()})
