"""What the demo promises: a checked run on the real clip, and a report that stands alone."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from skiparse.bench.clip import bundled_clip
from skiparse.bench.demo import attention, report
from skiparse.pattern import SkipPattern

QUICK = attention.SIZES["quick"]
N = 4 * 9 * 16
PATTERNS = [pattern(k) for k in (2, 4, 8) for pattern in (SkipPattern.single, SkipPattern.group)]


class Page(HTMLParser):
    """Images with their texts, table rows, and everything the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            self.images.append(values)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def tokens() -> attention.Tokens:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (25, 144, 256, 3), generator=generator, dtype=torch.uint8)
    return attention.project(attention.patch_features(frames), QUICK)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("demo")
    before = torch.get_num_threads()
    path = attention.run(folder / "new" / "out", threads=1, quick=True)
    assert path == folder / "new" / "out" / "report.html"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert torch.get_num_threads() == before
    return path.read_text(encoding="utf-8")


def test_the_table_has_every_pattern_beside_its_ceiling(page: str) -> None:
    rows = {row[0]: row for row in Page(page).rows[1:]}
    assert list(rows) == ["dense", *(report.name_of(pattern) for pattern in PATTERNS)]
    dense = SkipPattern.dense().pairs(N, QUICK.text)
    for pattern in PATTERNS:
        row = rows[report.name_of(pattern)]
        ceiling = dense / pattern.pairs(N, QUICK.text)
        assert row[1].split()[0] == str(pattern.sparsity)
        assert row[5] == f"{ceiling:.2f}×"  # noqa: RUF001  # the multiplication sign
        gain = float(rows["dense"][2]) / max(float(row[2]), 5e-4)
        shown = float(row[4].rstrip("×"))  # noqa: RUF001
        assert shown == pytest.approx(gain, rel=0.6, abs=0.3)  # seconds are shown to the ms
        assert (
            row[6] == f"{shown / ceiling:.0%}"
            or abs(float(row[6].rstrip("%")) / 100 - shown / ceiling) < 0.01
        )


def test_the_report_stands_alone(page: str) -> None:
    parsed = Page(page)
    assert parsed.loads
    assert all(load.startswith("data:image/") for load in parsed.loads)
    assert not parsed.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "url(" not in page
    assert "@import" not in page
    assert len(page) < 3_000_000


def test_every_picture_opens_and_says_what_it_is(page: str) -> None:
    images = Page(page).images
    assert len(images) == 6 + 1 + 3 * 3 + 4 * 3  # strip, plot, attended, weights at 3 steps
    for image in images:
        assert image["alt"]
        data = base64.b64decode((image["src"] or "").partition("base64,")[2], validate=True)
        Image.open(io.BytesIO(data)).load()


def test_the_report_says_what_it_is_not(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for words in (
        "Big Buck Bunny, (c) Blender Foundation, CC-BY 3.0",
        "No learned weights",
        "the text rows are stand-ins",
        "A quick run at a toy size",
        "One head, fp32, the forward pass",
        f"{N} of {N} tokens",
        torch.__version__,
    ):
        assert words in text


def test_the_report_escapes_what_it_is_given(tokens: attention.Tokens) -> None:
    evil = '<script>alert(1)</script>"'
    views = attention.look(tokens, (2, 4, 5), QUICK.grid)
    result = report.Result(
        rows=[
            report.Row(SkipPattern.dense(), (2.0,), 1.0, 0.0, 1.0),
            report.Row(SkipPattern.single(2), (1.0, 4.0, 1.25), 1.8, 0.0, 1.0),
        ],
        views=views,
        query=(2, 4, 5),
        k=4,
        frames=torch.zeros(25, 144, 256, 3, dtype=torch.uint8),
        frame_of_step=[0, 5, 13, 21],
        patch=16,
        text=QUICK.text,
        effective_keys=10,
        method=f"{evil}\n\n1. one ``{evil}``\n2. two",
        credit=evil,
        note=evil,
        facts={evil: evil},
    )
    page = report.render(result)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7  # credit stands twice
    assert "<ol><li>one <code>" in page
    assert "1.60&times;" in page  # 2 s over the median, 1.25 s
    assert "differ by up to 4.0 times" in page


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(_: object) -> str:
        raise RuntimeError("no")

    monkeypatch.setattr(report, "render", fail)
    with pytest.raises(RuntimeError):
        report.write(path, None)  # type: ignore[arg-type]  # it is not looked at
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_the_check_can_fail(tokens: attention.Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    error, allowed = attention.check(tokens, SkipPattern.group(4))
    assert 0 < error <= allowed < 1e-4
    right = attention.attention_call

    def wrong(tokens: attention.Tokens, pattern: SkipPattern) -> object:
        return right(tokens, SkipPattern.single(pattern.sparsity))

    monkeypatch.setattr(attention, "attention_call", wrong)
    attention.check(tokens, SkipPattern.single(4))
    with pytest.raises(AssertionError, match="out: off by"):
        attention.check(tokens, SkipPattern.group(4))


def test_weights_are_those_of_the_attention_that_is_timed(tokens: attention.Tokens) -> None:
    """The pictures' weights, applied to v, give the output of the public call."""
    query = (1, 3, 7)
    token = torch.arange(N).reshape(QUICK.grid)[query]
    flat = {"q": tokens.q * 0.1, "text_q": tokens.text_q * 0.1}  # or text would weigh nothing
    tokens = dataclasses.replace(tokens, **flat)
    dense, single, group, pair = attention.look(tokens, query, QUICK.grid)
    x = tokens
    silent = torch.zeros_like(x.text_v)  # the views hold the weights of video tokens only
    for view, pattern in (
        (dense, SkipPattern.dense()),
        (single, SkipPattern.single(4)),
        (group, SkipPattern.group(4)),
    ):
        mute = attention.Tokens(x.q, x.k, x.v, x.text_q, x.text_k, silent)
        out, _ = attention.attention_call(mute, pattern)()
        found = view.weights.flatten() @ x.v[0, :, 0]
        torch.testing.assert_close(found, out[0, token, 0])
        assert view.attended.sum() == N // pattern.sparsity
        assert not view.weights[~view.attended].any()

    first = attention.Tokens(x.q, x.k, x.v, x.text_q, x.text_k, silent)
    values, text_values = attention.attention_call(first, SkipPattern.single(4))()
    second = attention.Tokens(x.q, x.k, values, x.text_q, x.text_k, text_values)
    out, _ = attention.attention_call(second, SkipPattern.group(4))()
    torch.testing.assert_close(pair.weights.flatten() @ x.v[0, :, 0], out[0, token, 0])
    assert pair.attended.all()


def test_features_are_the_low_frequencies_of_a_patch() -> None:
    frames = torch.zeros(9, 32, 32, 3, dtype=torch.uint8)
    frames[5:, :16, :16, 0] = 200  # red comes up in the second half of the second step
    features = attention.patch_features(frames)
    assert features.shape == (2 * 2 * 2, 63)
    lone = features[4]
    others = functional.cosine_similarity(lone[None], features[[0, 1, 2, 3, 5, 6, 7]])
    assert (others < 0).all()  # unlike the rest
    torch.testing.assert_close(features[5], features[6])
    used = (features.abs().amax(0) > 0.1).nonzero()[:, 0].tolist()
    assert used == [0, 45]  # red alone: the constant of the mean and that of the change
    torch.testing.assert_close(features.norm(dim=1), torch.full((8,), 128**0.5))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    x = torch.randn(128, generator=torch.Generator().manual_seed(0)).expand(4 * 9 * 16, 128)
    turned = attention.rotated(x, (4, 9, 16)).reshape(4, 9, 16, 128)
    torch.testing.assert_close(turned[0, 0, 0], x[0])
    near = turned[1, 2, 3] @ turned[2, 4, 8]
    torch.testing.assert_close(near, turned[0, 1, 6] @ turned[1, 3, 11])
    assert near < turned[0, 0, 0] @ turned[0, 0, 1] < x[0] @ x[0]


def test_the_full_size_is_the_headline_shape() -> None:
    size = attention.SIZES["full"]
    assert (size.frames, size.height, size.width, size.text) == (121, 576, 1024, 512)
    assert size.grid == (16, 36, 64)
    assert attention.query_of(size.grid) == (9, 18, 23)


def test_a_missing_clip_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"skiparse\[demo\]"):
        attention.run(tmp_path / "out", quick=True)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        attention.run(tmp_path / "out", threads=0)


def test_the_package_loads_no_plotting_and_no_decoder() -> None:
    code = "import sys, skiparse.bench, skiparse.models.data; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "av", "PIL"} & set(done.stdout.split())
