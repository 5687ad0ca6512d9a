"""Both tiny models learn the scenes, the same way every time, and the files say what they did."""

import json

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from skiparse.bench.clip import FPS, bundled_clip
from skiparse.bench.experiments import learn, overfit, toy
from skiparse.bench.patches import GROUP
from skiparse.bench.patches import patches as patches_of
from skiparse.models import flow
from skiparse.models.data.video import read_video

QUICK = overfit.SIZES["quick"]
STEPS = 25


@pytest.fixture(scope="module")
def clip():
    try:
        return bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scenes(clip):
    return toy.scenes_of(clip, QUICK)


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("overfit") / "new" / "out"
    before = torch.get_num_threads()
    assert overfit.run(folder, steps=STEPS, size=QUICK) == folder / "overfit.png"
    assert torch.get_num_threads() == before
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "overfit.json").read_text())


def test_both_models_learn(found):
    dense, sparse = found["runs"]["dense"], found["runs"]["sparse"]
    assert dense["first"] != sparse["first"]  # the same weights, another attention
    assert dense["first"] == pytest.approx(sparse["first"], rel=1e-2)
    for one in (dense, sparse):
        assert [point["step"] for point in one["curve"]] == [0, 20, 25]
        first, *_, last = (point["loss"] for point in one["curve"])
        assert (one["first"], one["last"]) == (first, last)
        assert last < 0.8 * first
        assert one["factor"] == first / last
    assert found["sparse_over_dense"] == sparse["last"] / dense["last"]


def test_the_files_are_whole_and_alone(folder, found):
    assert sorted(path.name for path in folder.iterdir()) == ["overfit.json", "overfit.png"]
    with Image.open(folder / "overfit.png") as picture:
        picture.load()
        assert picture.width > 1000
    assert "stand-ins" in found["method"]
    assert "Big Buck Bunny" in found["credit"]


def test_it_gives_the_same_again(clip, folder, tmp_path):
    torch.manual_seed(77)  # nothing depends on the global generator, nor changes it
    before = torch.get_rng_state()
    overfit.run(tmp_path, steps=STEPS, size=QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("overfit.json", "overfit.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_pairs_are_those_of_the_layers(found, scenes):
    N, T = 16, QUICK.text
    assert found["tokens"] == N
    k = 4
    sparse = 4 * (N + T) ** 2 + 4 * 2 * (N // 2 + T) ** 2 + 2 * k * (N // k + T) ** 2
    assert found["runs"]["sparse"]["attention_pairs"] == sparse
    assert found["pairs_ratio"] == 10 * (N + T) ** 2 / sparse


def test_k_squared_divides_the_tokens_of_every_size():
    for size in overfit.SIZES.values():
        steps = 1 + (size.frames - 1) // GROUP
        tokens = steps * (size.height // 32) * (size.width // 32)
        assert all(tokens % k**2 == 0 for k in size.sparsity)


def test_latents_are_normal_and_lead_back_to_the_picture(scenes):
    x = scenes.latents
    assert x.shape == (2, 9, 2, 4, 8)
    flat = x.movedim(1, 0).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(9))
    torch.testing.assert_close(flat.std(1), torch.ones(9))
    grey = torch.zeros(1, 9, 2, 4, 8)
    constant = scenes.basis[0, 0]  # of the lowest coefficient, at every pixel
    for colour, level in enumerate((0.1, 0.4, 0.7)):
        grey[:, 3 * colour] = level / constant
    pictures = scenes.pictures((grey - scenes.mean) / scenes.spread)
    assert pictures.shape == (1, 2, 64, 128, 3)
    expected = torch.tensor([0.1, 0.4, 0.7]).expand_as(pictures)
    torch.testing.assert_close(pictures, expected)


def test_pictures_keep_what_the_basis_can_hold(clip, scenes):
    """Pixels, to latents, to pixels: the projection of each patch, right where it was."""
    frames = read_video(clip, frames=1, fps=FPS, size=(QUICK.height, QUICK.width))
    pictures = scenes.pictures(scenes.latents)[0, 0]
    patches = patches_of(frames[0].float() / 255)
    held = (patches @ scenes.basis @ scenes.basis.T).clamp(0, 1)
    torch.testing.assert_close(patches_of(pictures), held)


def test_a_perfect_model_has_no_loss_and_samples_the_scenes(scenes):
    def perfect(latents, timestep, text, pooled):
        sigma = (timestep / 1000)[:, None, None, None, None]
        return (latents - scenes.latents) / sigma

    assert learn.evaluate(perfect, scenes) < 1e-8
    torch.testing.assert_close(overfit.sample(perfect, scenes), scenes.latents)


def test_every_scene_of_the_evaluation_meets_every_level(scenes):
    seen = []

    def zero(latents, timestep, text, pooled):
        seen.append(timestep)
        return torch.zeros_like(latents)

    loss = learn.evaluate(zero, scenes)
    assert loss == pytest.approx(2, rel=0.1)  # the variance of noise and of latents
    levels = (torch.arange(learn.LEVELS) + 0.5) / learn.LEVELS
    assert torch.equal(torch.stack(seen, 1), flow.timesteps(levels).expand(QUICK.scenes, -1))


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        overfit.run(tmp_path / "out", steps=0)
    assert not (tmp_path / "out").exists()
