"""Scores follow from the clips alone, and what a filter keeps from the scores."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402  # after the checks
from pyarrow import parquet  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from skiparse.cli import main  # noqa: E402
from skiparse.models.data import filtering, scoring  # noqa: E402
from skiparse.models.data.buckets import Rule, assign  # noqa: E402
from skiparse.models.data.dataset import Clips  # noqa: E402
from skiparse.models.data.draws import Place  # noqa: E402
from skiparse.models.data.filtering import Thresholds, filtered, without_opening  # noqa: E402
from skiparse.models.data.limits import Limits  # noqa: E402
from skiparse.models.data.manifest import DataError, Manifest, Record  # noqa: E402
from skiparse.models.data.scorers import Scorers, load_aesthetic  # noqa: E402
from skiparse.models.data.scoring import edges, score, scored  # noqa: E402
from skiparse.models.data.tools import Tools  # noqa: E402

SIZE = (48, 96)
RED = (255, 0, 0)


# Films.


def film(*scenes: np.ndarray) -> bytes:
    """Scenes, uint8 ``[T, H, W, 3]``, one behind the other, without loss."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = *scenes[0].shape[1:3], "bgr0"
        for picture in np.concatenate(scenes):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def scene(seed: int, frames: int, speed: int = 1, level: float = 0.5) -> np.ndarray:
    """Blurred noise of a mean level, which moves by so many pixels a frame, to the left."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 1, SIZE[0], SIZE[1] + frames * max(speed, 1), generator=draw)
    noise = functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)
    grey = (255 * (level + 0.8 * (noise - noise.mean()))).clamp(0, 255).byte().numpy()[0, 0]
    shots = [grey[:, speed * t : speed * t + SIZE[1]] for t in range(frames)]
    return np.repeat(np.stack(shots)[..., None], 3, axis=3)


def written(pictures: np.ndarray, *, moving: bool = False) -> np.ndarray:
    """With something red near the lower edge, as a subtitle; it may move."""
    pictures = pictures.copy()
    for t, picture in enumerate(pictures):
        left = 10 + (7 * t % 40 if moving else 0)
        picture[41:46, left : left + 30] = RED
    return pictures


def flicker(frames: int) -> np.ndarray:
    """Noise that is new in every frame."""
    grey = np.random.default_rng(0).integers(26, 256, (frames, *SIZE, 1), np.uint8)
    return grey.repeat(3, axis=3)


def folder_of(folder: Path, **films: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in films.items():
        (folder / f"{name}.mkv").write_bytes(content)
        (folder / f"{name}.txt").write_text(f"The video shows {name}.")
    return folder


# Networks.


class Difference(nn.Module):
    """In place of LPIPS."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))


class Features(nn.Module):
    """Two layers of features."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small = torch.nn.functional.avg_pool2d(x, 4)
        return torch.cat([x, x.abs() + 0.1], 1), torch.cat([small, 1 - small], 1)


class Red(nn.Module):
    """Finds what is red, and takes it for text."""

    def forward(self, x: Tensor) -> Tensor:
        at = ((x[0, 0] > 0.9) & (x[0, 1] < 0.1)).nonzero()
        if at.numel() == 0:
            return torch.zeros(0, 4)
        low, high = at.amin(0), at.amax(0) + 1
        return torch.stack([low[1], low[0], high[1], high[0]]).float()[None]


class Bright(nn.Module):
    """Finds what is bright beautiful."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x.mean((1, 2, 3))


class Even(nn.Module):
    """Judges a video of bytes by its mean."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean()[None] / 255 - 0.3


class Wrong(nn.Module):
    """Gives what nobody asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().flatten()[:5]


def save(path: Path, network: nn.Module) -> str:
    torch.jit.save(torch.jit.script(network), path)
    return str(path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    every = {"motion": Difference(), "text": Red(), "aesthetic": Bright(), "technical": Even()}
    found = {name: save(folder / f"{name}.pt", network) for name, network in every.items()}
    more = {"features": Features(), "wrong": Wrong()}
    return found | {name: save(folder / f"{name}.pt", network) for name, network in more.items()}


def tools_of(networks: dict[str, str], *names: str, **more: Any) -> Tools:
    return Tools(**{name: networks[name] for name in names}, **more)


def record_of(path: Path, frames: int, **more: Any) -> Record:
    whole = Record(path.parent, path.name, ("x",), *SIZE, frames, 24.0, 0, None, True)
    return replace(whole, **more)


def pieces(path: Path, frames: int, tools: Tools, **more: Any) -> list[dict[str, Any]]:
    return scored(record_of(path, frames, **more), Scorers.of(tools), tools, Limits())


# Cuts and motion.


@pytest.mark.parametrize("how", ["flow", "motion", "features"])
def test_a_jump_is_a_cut_at_its_frame(tmp_path: Path, networks: dict[str, str], how: str) -> None:
    """In the middle, and behind the last frame that is compared with one before."""
    if how == "flow":
        pytest.importorskip("cv2")
    tools = Tools(motion="flow" if how == "flow" else networks[how], apart=4)
    path = tmp_path / "a.mkv"
    scenes = [scene(0, 23, level=0.3), scene(1, 19, level=0.7), scene(2, 2, level=0.2)]
    path.write_bytes(film(*scenes))
    found = pieces(path, 44, tools)
    assert [(piece["start"], piece["frames"]) for piece in found] == [(0, 23), (23, 19), (42, 2)]
    assert found[2]["motion"] is None
    alone = [pieces_of(tmp_path, s, tools)[0]["motion"] for s in scenes[:2]]
    assert [piece["motion"] for piece in found[:2]] == pytest.approx(alone, rel=0.2)


def pieces_of(folder: Path, pictures: np.ndarray, tools: Tools) -> list[dict[str, Any]]:
    path = folder / "alone.mkv"
    path.write_bytes(film(pictures))
    return pieces(path, len(pictures), tools)


@pytest.mark.parametrize("how", ["flow", "motion", "features"])
def test_what_moves_evenly_is_not_cut(tmp_path: Path, networks: dict[str, str], how: str) -> None:
    if how == "flow":
        pytest.importorskip("cv2")
    tools = Tools(motion="flow" if how == "flow" else networks[how], apart=4)
    still = pieces_of(tmp_path, scene(0, 40, speed=0), tools)
    slow = pieces_of(tmp_path, scene(0, 40, speed=1), tools)
    assert len(still) == len(slow) == 1
    if how == "flow":  # which is not exactly 0, and is called static
        assert still[0]["motion"] < Thresholds.read().motion["flow"][0] / 10
    else:
        assert still[0]["motion"] == 0
    assert slow[0]["motion"] > 0.01
    if how == "flow":  # a pixel a frame, over the diagonal
        assert slow[0]["motion"] == pytest.approx(4 / np.hypot(*SIZE), rel=0.15)


def test_motion_is_the_mean_over_pairs_by_hand(tmp_path: Path, networks: dict[str, str]) -> None:
    """Some frames apart, of all of them, however few are in memory at once."""
    shots = scene(3, 30)
    path = tmp_path / "a.mkv"
    path.write_bytes(film(shots))
    signed = torch.from_numpy(shots).double() / 127.5 - 1
    for apart in (1, 7):
        seen = signed[2:27][::apart]
        wanted = float((seen[1:] - seen[:-1]).abs().mean())
        for chunk in (64, 5):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(scoring, "_CHUNK", chunk)
                tools = tools_of(networks, "motion", apart=apart)
                (found,) = pieces(path, 25, tools, start=2)
            assert found["motion"] == pytest.approx(wanted, rel=1e-5)
            assert (found["start"], found["frames"]) == (2, 25)


def test_distances_of_features_by_hand(networks: dict[str, str]) -> None:
    pairs = Scorers.of(Tools(motion=networks["features"])).pairs
    frames = torch.randint(256, (3, 8, 12, 3), generator=torch.Generator().manual_seed(0)).byte()
    motion, jump = pairs(frames)
    layers = Features()(frames.permute(0, 3, 1, 2).float() / 127.5 - 1)
    for n in range(2):
        cosines = [functional.cosine_similarity(x[n], x[n + 1], dim=0).mean() for x in layers]
        assert float(motion[n]) == pytest.approx(float(2 - 2 * sum(cosines) / 2), rel=1e-4)
    assert torch.equal(motion, jump)


# Text, and what is left without it.


def test_text_at_an_edge_is_cropped_where_it_costs_least() -> None:
    def crop(*boxes: tuple[float, ...]) -> tuple[float, ...]:
        return edges([torch.tensor([box], dtype=torch.float64) for box in boxes])

    assert edges([]) == (0, 0, 0, 0)
    assert crop((0.1, 0.85, 0.9, 0.95)) == pytest.approx((0, 0.15, 0, 0))
    assert crop((0.1, 0.79, 0.9, 0.95)) == (0, 0, 0, 0)  # costs 0.21
    assert crop((0.4, 0.4, 0.6, 0.6)) == (0, 0, 0, 0)
    assert crop((0.0, 0.0, 0.1, 0.05), (0.9, 0.3, 0.95, 0.4)) == pytest.approx((0.05, 0, 0, 0.1))
    assert crop((0.3, 0.82, 0.5, 0.9), (0.3, 0.9, 0.5, 1)) == pytest.approx((0, 0.18, 0, 0))


def test_all_is_scored_again_without_its_text(tmp_path: Path, networks: dict[str, str]) -> None:
    """Crop and motion by hand: the picture stands still, and the text on it moves."""
    still = scene(0, 30, speed=0)
    path = tmp_path / "a.mkv"
    path.write_bytes(film(written(still, moving=True)))
    tools = tools_of(networks, "motion", "text", "aesthetic", "technical")
    (found,) = pieces(path, 30, tools)
    assert (found["cropped"], found["top"], found["left"]) == (True, 0, 0)
    assert (found["height"], found["width"]) == (41, 96)
    assert found["motion"] > 0.01
    assert found["motion_cropped"] == 0
    level = float(still[:1, :41].mean()) / 255
    assert found["brightness"] == pytest.approx(level, rel=1e-5)
    assert found["aesthetic"] == pytest.approx(10 * level, rel=1e-2)  # of 224 x 224, the middle
    assert found["technical"] == pytest.approx(level - 0.3, rel=1e-5)
    (inner,) = pieces(path, 30, tools, crop=(4, 8, 42, 80), height=42, width=80)
    assert [inner[n] for n in ("top", "left", "height", "width")] == [4, 8, 37, 80]


def test_a_picture_has_its_brightness(tmp_path: Path, networks: dict[str, str]) -> None:
    Image.new("RGB", (96, 48), (255, 0, 51)).save(tmp_path / "a.png")
    tools = tools_of(networks, "motion", "text", "aesthetic", "technical")
    given = {"is_video": False, "fps": 0.0}
    (found,) = pieces(tmp_path / "a.png", 1, tools, **given)
    assert found["brightness"] == pytest.approx(0.2126 + 0.0722 * 0.2, rel=1e-6)
    assert "motion" not in found
    assert "aesthetic" not in found


def test_laions_predictor_by_hand(tmp_path: Path) -> None:
    """CLIP as transformers save it, the layers as LAION's file names them."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=1,
        num_attention_heads=2, image_size=224, patch_size=56,
    )  # fmt: skip
    clip = CLIPVisionModelWithProjection(config).eval()
    clip.save_pretrained(tmp_path)
    layers = {0: nn.Linear(12, 8), 2: nn.Linear(8, 4), 4: nn.Linear(4, 1)}
    state = {f"layers.{n}.{k}": x for n, m in layers.items() for k, x in m.state_dict().items()}
    torch.save(state, tmp_path / "linear.pth")
    pictures = torch.rand(2, 3, 224, 224)
    mean, spread = (
        torch.tensor(x)[:, None, None]
        for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        wanted = clip(pixel_values=(pictures - mean) / spread).image_embeds
        wanted = wanted / wanted.norm(dim=1, keepdim=True)
        for layer in layers.values():
            wanted = layer(wanted)
    found = load_aesthetic(tmp_path)(pictures)
    torch.testing.assert_close(found, wanted[:, 0].double())
    torch.save({k: x for k, x in state.items() if "0" not in k}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"takes embeddings of 8 numbers, and CLIP in .* gives 12"):
        load_aesthetic(tmp_path)
    (tmp_path / "linear.pth").unlink()
    with pytest.raises(ValueError, match=r"holds 0 files \.pth"):
        load_aesthetic(tmp_path)


@pytest.mark.parametrize(
    ("name", "gives"),
    [
        ("motion", "features"),
        ("text", "boxes"),
        ("aesthetic", "number for each of 1 pictures"),
        ("technical", "number for a video"),
    ],
)
def test_other_networks_are_refused(
    tmp_path: Path, networks: dict[str, str], name: str, gives: str
) -> None:
    source = folder_of(tmp_path / "in", a=film(scene(0, 9)))
    missing = str(tmp_path / "none.pt")
    tools = Tools(**{"motion": networks["motion"], name: missing})
    with pytest.raises(FileNotFoundError, match=r"none\.pt is not there; networks are not shipped"):
        score(source, tmp_path / "out", tools)
    (tmp_path / "none.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"none\.pt is no TorchScript"):
        score(source, tmp_path / "out", tools)
    shutil.copy(networks["wrong"], missing)
    with pytest.raises(ValueError, match=rf"none\.pt gives no {gives}"):
        score(source, tmp_path / "out", tools)
    assert not list((tmp_path / "out" / "parts").iterdir())


# Parts.


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of every fate, by level: the aesthetic score is ten times that."""
    still = scene(4, 30, speed=0, level=0.6)
    return folder_of(
        tmp_path_factory.mktemp("films"),
        a_good=film(scene(0, 30, level=0.6)),
        b_dark=film(scene(1, 30, level=0.3)),
        c_still=film(still),
        d_titled=film(written(scene(2, 30, level=0.6))),
        e_cut=film(scene(5, 20, level=0.5), scene(6, 20, level=0.85)),
        f_crawl=film(written(still, moving=True)),
        g_short=film(scene(7, 6, level=0.6)),
        h_wild=film(flicker(30)),
    )


def every(networks: dict[str, str], **more: Any) -> Tools:
    return tools_of(networks, "motion", "text", "aesthetic", "technical", **more)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "parts").iterdir())}


@pytest.fixture(scope="module")
def scores(films: Path, networks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_PART", 3)
        assert score(films, out, every(networks)) == (3, 3)
    return out


def test_scores_are_the_same_whoever_makes_them(
    films: Path, scores: Path, networks: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By shares of several runs, in other processes, and in two sittings."""
    monkeypatch.setattr(scoring, "_PART", 3)
    out = tmp_path / "out"
    assert score(films, out, every(networks), share=(1, 2), workers=1) == (1, 3)
    assert score(films, out, every(networks), share=(0, 2)) == (3, 3)
    assert contents(out) == contents(scores)
    seen: list[str] = []
    monkeypatch.setattr(
        scoring, "scored", lambda record, *rest: [seen.append(record.path), {"error": "x"}][1:]
    )
    (out / "parts" / "000001.parquet").unlink()
    score(films, out, every(networks))
    assert seen == ["d_titled.mkv", "e_cut.mkv", "f_crawl.mkv"]


def test_scores_of_something_else_are_refused(
    films: Path, scores: Path, networks: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(scoring, "_PART", 3)
    with pytest.raises(DataError, match="has scores of something else: scorers "):
        score(films, scores, every(networks, apart=4))
    with pytest.raises(DataError, match="has scores of something else: scorers "):
        score(films, scores, replace(every(networks), aesthetic=networks["technical"]))
    other = folder_of(tmp_path / "in", a=film(scene(0, 9)))
    with pytest.raises(DataError, match="has scores of something else: fingerprint "):
        score(other, scores, every(networks))
    for share in ((2, 2), (0, 0)):
        with pytest.raises(DataError, match="share must be I/N with I from 0 and below N"):
            score(films, tmp_path / "out", every(networks), share=share)


def test_a_clip_that_cannot_be_read_costs_itself(networks: dict[str, str], tmp_path: Path) -> None:
    """Annotations may promise more than there is."""
    folder = folder_of(tmp_path / "in", a=film(scene(0, 20, level=0.6)), b=film(scene(1, 10)))
    common = {"cap": "x", "resolution": {"height": 48, "width": 96}, "num_frames": 20}
    listed = folder / "clips.json"
    listed.write_text(json.dumps([{"path": name, **common} for name in ("b.mkv", "a.mkv")]))
    score(listed, tmp_path / "out", every(networks))
    found = parquet.read_table(tmp_path / "out" / "parts" / "000000.parquet").to_pylist()
    assert [row["row"] for row in found] == [0, 1]
    assert "'b.mkv': ends after" in found[0]["error"]
    assert found[1]["error"] is None
    report = filtered(tmp_path / "out", tmp_path / "kept")
    assert (report.dropped, report.used) == ({"cannot be read": 1}, 1)


# The filter.


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "clips-0.jsonl").read_text().splitlines()]


def test_what_is_kept_by_the_published_thresholds(
    scores: Path, films: Path, tmp_path: Path
) -> None:
    """Each reason once; cuts, crops and captions as they come out."""
    report = filtered(scores, tmp_path / "out")
    assert report.dropped == {
        "aesthetic too low": 1,
        "nearly static": 1,
        "nearly static without its text": 1,
        "too short for its motion": 1,
        "jitters, or moves too much": 1,
    }
    assert [names[0].split()[0] for names in report.examples.values()] == [
        "b_dark.mkv", "c_still.mkv", "f_crawl.mkv", "g_short.mkv", "h_wild.mkv",
    ]  # fmt: skip
    kept = lines(tmp_path / "out")
    assert [(row["path"], row["cut"], row["cap"]) for row in kept] == [
        ("a_good.mkv", [0, 30], ["A_good."]),
        ("d_titled.mkv", [0, 30], ["D_titled."]),
        ("e_cut.mkv", [0, 20], ["E_cut."]),
        ("e_cut.mkv", [20, 40], ["A high-aesthetic scene, E_cut."]),
    ]
    assert [row.get("crop") for row in kept] == [None, [0, 96, 0, 41], None, None]
    assert report.more["cropped, for text at an edge"] == 1
    assert report.more["pieces between cuts, with the captions of the whole"] == 2
    assert report.more["clips of high aesthetic"] == 1
    assert report.more["captions without their opening"] == 4


def test_cuts_and_crops_reach_the_reader(scores: Path, tmp_path: Path) -> None:
    """What is read is of the scene, and nothing red is in it."""
    filtered(scores, tmp_path / "out", shown=0)
    manifest = Manifest.open(tmp_path / "out" / "data.txt")
    assert [manifest.record(n).start for n in range(4)] == [0, 0, 0, 20]
    rule = Rule(frames=17, size=(32, 64), longest=100, min_aspect=0.3)
    data = Clips(manifest, assign(manifest, rule, 0), rule)
    titled, first, second = (data.read(Place(0, 0, n)).frames.double() for n in (1, 2, 3))
    assert float((titled[..., 0] - titled[..., 1]).abs().max()) < 2
    assert float(first.mean()) / 255 == pytest.approx(0.5, abs=0.02)
    assert float(second.mean()) / 255 == pytest.approx(0.85, abs=0.02)


def test_the_page_shows_what_lies_at_each_border(scores: Path, tmp_path: Path) -> None:
    filtered(scores, tmp_path / "out", shown=2)
    page = (tmp_path / "out" / "filter.html").read_text()
    named = re.findall(r'src="pictures/([^"]+)"', page)
    there = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    assert set(named) == there
    assert {"motion-least-out-0.png", "motion-most-out-0.png", "aesthetic-least-out-0.png"} <= there
    with Image.open(tmp_path / "out" / "pictures" / "motion-least-out-0.png") as image:
        assert image.size == (4 * 96 + 3 * 2, 48)
        pixels = np.asarray(image)
    assert (pixels[:, [96, 97]] == 255).all()
    assert not (pixels[:, [95, 98]] == 255).all()
    assert "<h2>aesthetic: from 4.75</h2>" in page
    assert "<h2>motion, once text at the edges is cropped away: from 0.001</h2>" in page
    assert "<h3>dropped, nearest below the least, 4.75</h3>" in page
    assert re.search(r"<figcaption>(2\.9\d*|3(\.0\d*)?) b_dark\.mkv, from frame 0", page)
    told = json.loads((tmp_path / "out" / "filter.json").read_text())
    chart = next(each for each in told["histograms"] if each["score"] == "aesthetic")
    assert (sum(chart["pieces"]), sum(chart["kept"])) == (9, 4)
    assert chart["least"] == 4.75
    assert (told["used"], told["of"]) == (4, 9)


def test_thresholds_of_ones_own(scores: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "motion: {lpips: null}\naesthetic: null\ntechnical: null\nbrightness: [null, 0.45]\n"
        "min_frames: 7\nopenings: ['The video ']\n"
    )
    report = filtered(scores, tmp_path / "out", thresholds=Thresholds.read(file))
    assert [row["path"] for row in lines(tmp_path / "out")] == ["b_dark.mkv"]
    assert lines(tmp_path / "out")[0]["cap"] == ["Shows b_dark."]
    assert report.dropped == {"too bright": 7, "shorter than min_frames": 1}
    file.write_text("min_side: 48\n")
    report = filtered(scores, tmp_path / "out", thresholds=Thresholds.read(file))
    assert report.dropped["smaller than min_side"] == 1
    file.write_text("cut_captions: false\n")
    report = filtered(scores, tmp_path / "out", thresholds=Thresholds.read(file))
    assert [row["path"] for row in lines(tmp_path / "out")] == ["a_good.mkv", "d_titled.mkv"]
    assert report.dropped["captions of the whole clip"] == 2


def test_thresholds_are_kept_themselves(scores: Path, tmp_path: Path) -> None:
    """Whole ranges, ends included; above is above; once cropped, motion is asked for its least."""
    part = parquet.read_table(scores / "parts" / "000001.parquet").to_pylist()
    titled = next(piece for piece in part if piece["cropped"])
    assert titled["motion"] < titled["motion_cropped"]
    only, same = "d_titled.mkv", (titled["brightness"], titled["brightness"])
    own = {"aesthetic": None, "technical": None, "above": titled["aesthetic"]}
    for changes in (
        {"motion": {"lpips": None}, "brightness": same},
        {"motion": {"lpips": (titled["motion"], titled["motion"])}},
    ):
        asked = replace(Thresholds.read(), **own | changes)
        filtered(scores, tmp_path / "out", thresholds=asked, shown=0)
        assert [(row["path"], row["cap"]) for row in lines(tmp_path / "out")] == [
            (only, ["D_titled."])
        ]


def test_an_estimate_of_the_length_makes_no_piece(scores: Path) -> None:
    """Whose captions would be of a longer clip."""
    part = parquet.read_table(scores / "parts" / "000000.parquet")
    asked = replace(Thresholds.read(), cut_captions=False)
    for kind, reason in ((1, "captions of the whole clip"), (2, None)):
        rows = SimpleNamespace(is_video=np.full(3, kind), frames=np.full(3, 31))
        assert filtering._why(part, rows, asked, []) == [reason] * 3


def test_threads_are_as_before() -> None:
    torch.set_num_threads(2)
    with scoring._one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motoin: 1", "there is no 'motoin'; give motion, aesthetic"),
        ("motion: [0, 1]", "motion must be a range of each measure"),
        ("motion: {lpips: 3}", r"motion\.lpips must be \[least, most\] or null, got 3"),
        ("aesthetic: [a, 1]", r"aesthetic must be of numbers or null, got \['a', 1\]"),
        ("aesthetic: [.nan, 1]", "aesthetic must be of numbers"),
        ("aesthetic: [5, 4]", "aesthetic: 5 is more than 4"),
        ("min_side: 0", "min_side must be a whole number from 1, got 0"),
        ("min_frames: true", "min_frames must be a whole number from 1, got True"),
        ("cut_captions: 0", "cut_captions must be true or false, got 0"),
        ("openings: [3]", "openings must be texts"),
        ("high_aesthetic: {above: x}", "high_aesthetic must be a number and a text"),
        ("high_aesthetic: {over: 1}", "high_aesthetic must have above and prefix"),
        ("aesthetic: null\naesthetic: null", "'aesthetic' is there twice"),
        ("- a", "must hold a table of thresholds"),
    ],
)
def test_thresholds_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Thresholds.read(file)


def test_the_published_thresholds() -> None:
    """As in the report of v1.3."""
    found = Thresholds.read()
    assert found.motion["lpips"] == (0.001, 0.3)
    assert (found.aesthetic, found.technical, found.brightness) == ((4.75, None), (0, None), None)
    assert (found.above, found.prefix) == (6.25, "A high-aesthetic scene, ")
    assert found.motion["flow"] == (0.0005, 0.1)  # ours, as what follows
    assert (found.min_side, found.min_frames, found.cut_captions) == (1, 1, True)
    assert scoring.MOST_CROP == 0.2
    assert {"The video shows ", "The video depicts ", "In the video, "} <= set(found.openings)


def test_openings() -> None:
    openings = Thresholds.read().openings
    for caption, left in (
        ("The video shows a cat.", "A cat."),
        ("the Video Depicts  a cat", "A cat"),
        ("In the video, the video shows a cat", "The video shows a cat"),
        ("A cat in the video, asleep", "A cat in the video, asleep"),
        ("The video shows", "The video shows"),
        ("The video shows  ", ""),
    ):
        assert without_opening(caption, openings) == left
    several = ("The video ", "The video shows ", "The ")
    assert without_opening("The video shows a cat", several) == "A cat"


def test_what_was_not_scored_is_not_passed_over(
    films: Path, networks: dict[str, str], tmp_path: Path
) -> None:
    """Neither a score that is missing, nor a measure without a range."""
    few = folder_of(tmp_path / "in", a=film(scene(0, 20, level=0.6)))
    score(few, tmp_path / "few", tools_of(networks, "motion"))
    with pytest.raises(
        DataError, match=r"no scores of text: score with --text FILE, .*--without text"
    ):
        filtered(tmp_path / "few", tmp_path / "out")
    without = ["text", "aesthetic"]
    with pytest.raises(DataError, match="no scores of technical"):
        filtered(tmp_path / "few", tmp_path / "out", without=without)
    with pytest.raises(DataError, match="without must be of text, aesthetic, technical, got sound"):
        filtered(tmp_path / "few", tmp_path / "out", without=["sound"])
    without.append("technical")
    assert filtered(tmp_path / "few", tmp_path / "out", without=without).used == 1
    score(few, tmp_path / "deep", Tools(motion=networks["features"]))
    with pytest.raises(DataError, match="motion was measured by features, of which the thresholds"):
        filtered(tmp_path / "deep", tmp_path / "new", without=without)
    assert not (tmp_path / "new").exists()


def test_scores_that_are_not_whole_are_refused(films: Path, scores: Path, tmp_path: Path) -> None:
    copy = tmp_path / "scores"
    shutil.copytree(scores, copy)
    part = copy / "parts" / "000001.parquet"
    data = part.read_bytes()
    part.unlink()
    with pytest.raises(DataError, match="is not complete: 1 of 3 parts are missing"):
        filtered(copy, tmp_path / "out")
    part.write_bytes(data[:-9])
    with pytest.raises(DataError, match=r"000001\.parquet is damaged"):
        filtered(copy, tmp_path / "out")
    table = parquet.read_table(scores / "parts" / "000001.parquet")
    parquet.write_table(table.replace_schema_metadata({"of": "others"}), part)
    with pytest.raises(DataError, match=r"000001\.parquet is of other scores"):
        filtered(copy, tmp_path / "out")
    with pytest.raises(DataError, match=r"has no scores\.json"):
        filtered(tmp_path, tmp_path / "out")
    part.write_bytes(data)
    with pytest.raises(DataError, match="is the folder of the scores"):
        filtered(copy, copy)
    assert not (tmp_path / "out").exists()


def test_scores_of_clips_that_changed_are_refused(networks: dict[str, str], tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", a=film(scene(0, 20, level=0.6)))
    score(source, tmp_path / "scores", every(networks))
    (source / "a.txt").write_text("another caption")
    with pytest.raises(DataError, match=r"in is not what .* has scores of; score it anew"):
        filtered(tmp_path / "scores", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_images_only_the_resolution_is_asked(networks: dict[str, str], tmp_path: Path) -> None:
    """As was published; brightness too, where somebody wants that."""
    source = folder_of(tmp_path / "in", a=film(scene(0, 20, level=0.6)))
    for name, size in (("b", (96, 48)), ("c", (40, 30))):
        Image.new("RGB", size, (9, 9, 9)).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text("In the image, night")
    score(source, tmp_path / "scores", every(networks))
    asked = replace(Thresholds.read(), min_side=40)
    report = filtered(tmp_path / "scores", tmp_path / "out", thresholds=asked)
    assert [row["cap"] for row in lines(tmp_path / "out")] == [["A."], ["Night"]]
    assert report.dropped == {"smaller than min_side": 1}
    asked = replace(asked, brightness=(0.1, None), min_side=1)
    report = filtered(tmp_path / "scores", tmp_path / "out", thresholds=asked)
    assert report.dropped == {"too dark": 2}


def test_nothing_that_is_kept_is_told(networks: dict[str, str], tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", a=film(scene(0, 20, speed=0, level=0.6)))
    score(source, tmp_path / "scores", every(networks))
    with pytest.raises(DataError, match=r"nothing of .* is kept: 1 nearly static"):
        filtered(tmp_path / "scores", tmp_path / "out")
    assert not (tmp_path / "out" / "data.txt").exists()


def test_the_commands(
    films: Path, networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of(tmp_path / "in", a=film(scene(0, 20, level=0.6)))
    words = ["data", "score", str(source), str(tmp_path / "scores")]
    for name in ("motion", "text", "aesthetic", "technical"):
        words += [f"--{name}", networks[name]]
    assert main([*words, "--share", "1"]) == 2
    assert "--share 1: give I/N" in capsys.readouterr().err
    assert main([*words, "--share", "0/1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'scores'}: 1 of 1 parts scored\n"
    out = tmp_path / "kept"
    assert main(["data", "filter", str(tmp_path / "scores"), str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 captions without their opening",
        f"{tmp_path / 'scores'}: used 1 of 1; nothing dropped",
        f"what was dropped, with pictures: {out / 'filter.html'}",
        f"clips: {out / 'data.txt'}",
    ]
    assert main(["data", "check", str(out / "data.txt"), "--out", str(tmp_path / "c.json")]) == 0


def test_without_any_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By optical flow, and by nothing else, which has to be said."""
    pytest.importorskip("cv2")
    still = film(scene(1, 20, speed=0, level=0.6))
    source = folder_of(tmp_path / "in", a=film(scene(0, 20, level=0.6)), b=still)
    assert main(["data", "score", str(source), str(tmp_path / "scores")]) == 0
    words = ["data", "filter", str(tmp_path / "scores"), str(tmp_path / "out")]
    assert main(words) == 2
    assert "has no scores of text" in capsys.readouterr().err
    assert main([*words, "--without", "text,aesthetic,technical"]) == 0
    assert "used 1 of 2; dropped 1: 1 nearly static" in capsys.readouterr().out


def test_without_opencv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of(tmp_path / "in", a=film(scene(0, 9)))
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "skiparse.models.data.optical", raising=False)
    assert main(["data", "score", str(source), str(tmp_path / "scores")]) == 2
    assert "cv2 is not installed; pip install 'skiparse[score]'" in capsys.readouterr().err
