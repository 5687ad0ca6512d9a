"""What the text encoders promise: T5's and CLIP's own numbers, once a prompt, alone or not."""

from __future__ import annotations

import logging
import string

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # after the check for the extra
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from skiparse.models import text
from skiparse.models.text import TextEmbeddings, TextEncoders, clean


def tiny_tokenizer(start, end, length):
    """One token for each character, between ``start`` and ``end`` where given."""
    special = list(filter(None, ("<pad>", start, "<unk>", end)))
    vocabulary = {token: i for i, token in enumerate([*special, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, (start, "$A", end))),
        special_tokens=[(token, vocabulary[token]) for token in special],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=start,
        eos_token=end,
        model_max_length=length,
    )


def tiny_encoders():
    """The four parts, random, with the widths of ``SUV.presets["tiny"]``."""
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=128, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    clip = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=128, hidden_size=16, intermediate_size=32, projection_dim=20,
            num_hidden_layers=2, num_attention_heads=2, bos_token_id=1, eos_token_id=3,
            pad_token_id=0,
        )
    )  # fmt: skip
    return (
        tiny_tokenizer(None, "</s>", 512),
        t5.eval(),
        tiny_tokenizer("<start>", "<end>", 77),
        clip.eval(),
    )


def save(folder, parts):
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    for name, part in zip(names, parts, strict=True):
        part.save_pretrained(folder / name)


def equal(a, b):
    return (
        torch.equal(a.text, b.text)
        and torch.equal(a.text_mask, b.text_mask)
        and torch.equal(a.pooled, b.pooled)
    )


@pytest.fixture
def encoders():
    return TextEncoders(*tiny_encoders())


def test_the_numbers_are_those_of_the_models(encoders):
    prompt = "a red kite over the sea"
    found = encoders.encode(prompt)
    tokens = encoders.tokenizer(prompt, padding="max_length", max_length=512, return_tensors="pt")
    with torch.no_grad():
        text = encoders.encoder(**tokens).last_hidden_state
        ids = encoders.tokenizer_2(
            prompt, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        pooled = encoders.encoder_2(input_ids=ids).text_embeds
    assert found.text.shape == (1, 512, 24)
    assert found.text_mask.shape == (1, 512)
    assert found.text_mask.dtype == torch.bool
    real = len(prompt) + 1  # T5 ends a text with </s>
    assert found.text_mask[0].tolist() == [True] * real + [False] * (512 - real)
    assert torch.equal(found.text[:, :real], text[:, :real])
    assert not found.text[:, real:].any()
    assert torch.equal(found.pooled, pooled)


def test_t5_does_not_see_the_padding(encoders):
    """Inside T5 the mask counts: the same as without padding, to twice eager rounding."""
    prompt = "rain"
    found = encoders.encode(prompt)
    with torch.no_grad():
        tokens = encoders.tokenizer(prompt, return_tensors="pt")
        short = encoders.encoder(**tokens).last_hidden_state
        exact = encoders.encoder.double()(**tokens).last_hidden_state
    own = (short - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found.text[:, : short.shape[1]] - exact).abs().max() <= 2 * own


def test_a_prompt_may_be_cut_to_less(encoders):
    """As a tokenizer cuts it: its end goes, not that of a text."""
    short = encoders.encode("rain", max_sequence_length=8)
    assert short.text_mask.tolist() == [[True] * 5 + [False] * 3]
    torch.testing.assert_close(short.text[:, :5], encoders.encode("rain").text[:, :5])
    cut = encoders.encode("rain over the sea", max_sequence_length=8)
    with torch.no_grad():
        tokens = encoders.tokenizer("rain ov", return_tensors="pt")
        torch.testing.assert_close(cut.text, encoders.encoder(**tokens).last_hidden_state)
    for wrong in (0, 513, 7.5, None):
        with pytest.raises(
            ValueError, match="max_sequence_length must be from 1 to 512 tokens of T5"
        ):
            encoders.encode("rain", max_sequence_length=wrong)


def test_neighbours_do_not_matter(encoders):
    prompts = ["a cat", "a dog in the snow, seen from far away", ""]
    together = encoders.encode(prompts)
    assert len(together) == 3
    assert together.text_mask.sum(1).tolist() == [6, 38, 1]
    fresh = TextEncoders(*tiny_encoders())
    alone = TextEmbeddings.cat([fresh.encode(prompt) for prompt in prompts])
    assert equal(together, alone)
    assert not torch.equal(together.pooled[0], together.pooled[1])


def test_a_prompt_is_encoded_once_and_outlives_the_encoders(encoders, monkeypatch):
    calls = []
    forward = encoders.encoder.forward
    monkeypatch.setattr(encoders.encoder, "forward", lambda **x: (calls.append(1), forward(**x))[1])
    before = encoders.encode(["a cat", "a cat", "A  cat"])  # the same three, once clean
    assert len(calls) == 1
    encoders.free()
    assert encoders.encoder is encoders.encoder_2 is None
    assert equal(before, encoders.encode(["a cat"] * 3))
    with pytest.raises(ValueError, match="'a dog' was not encoded before"):
        encoders.encode("a dog")
    with pytest.raises(ValueError, match="not encoded before"):
        encoders.encode("a CAT", clean_caption=False)


def test_loading_is_offline_and_exact(tmp_path, monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    parts = tiny_encoders()
    save(tmp_path, parts)
    loaded = TextEncoders.from_pretrained(tmp_path)
    assert equal(loaded.encode("a cat"), TextEncoders(*parts).encode("a cat"))
    half = TextEncoders.from_pretrained(tmp_path, dtype=torch.bfloat16).encode("a cat")
    assert half.text.dtype == half.pooled.dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match="no text encoder in"):
        TextEncoders.from_pretrained(tmp_path / "elsewhere")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_missing_weights_are_refused(tmp_path, part):
    """Where transformers would make them up and warn."""
    save(tmp_path, tiny_encoders())
    file = tmp_path / part / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "layer_norm" in name)
    save_file({k: v for k, v in state.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} lacks weights.*layer_norm"):
        TextEncoders.from_pretrained(tmp_path)


def test_long_prompts_are_cut_aloud(encoders, caplog, monkeypatch):
    monkeypatch.setattr(text, "_told", set())
    with caplog.at_level(logging.WARNING):
        found = encoders.encode("long " * 120)
    assert found.text_mask.all()
    cut = [record.getMessage() for record in caplog.records if record.name.startswith("skiparse")]
    assert len(cut) == 2
    assert "of 600 tokens is cut to the 512" in cut[0]  # 599 characters and </s>
    assert "of 601 tokens is cut to the 77" in cut[1]
    caplog.clear()
    encoders.encode(["short", "longer " * 120])  # captions are often too long for CLIP
    assert not caplog.records


def test_template(encoders):
    plain = encoders.encode("fine, a {cat}", clean_caption=False)
    assert equal(encoders.encode("a {cat}", template="fine, {prompt}"), plain)
    with pytest.raises(ValueError, match=r"template must contain \{prompt\}, got 'fine'"):
        encoders.encode("a cat", template="fine")
    with pytest.raises(ValueError, match="prompts is empty"):
        encoders.encode([])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("A  Cat\n   on a\tMat ", "a cat on a mat"),
        ("<b>Bold</b> &amp;amp; see https://a.b/c?d=e or www.x.org", "bold & see or"),
        ("by @someone_1, mail me@home.org", "by , mail me@home.org"),
        ("snow \u96ea falls", "snow falls"),
        ("a\u2014b \u2013 c", "a-b - c"),
        ("\u201chi\u201d \u00abyo\u00bb it\u2019s", '"hi" "yo" it\'s'),
        ("at 10.0.0.1 #123 12345 1234567", "at 12345"),
        ("see IMG_1.jpeg on page 3, worldwide free shipping!", "see on , !"),
        ("3 < 4 and 5 > 2", "3 < 4 and 5 > 2"),
        ("", ""),
    ],
)
def test_cleaning(raw, expected):
    assert clean(raw) == expected
    assert clean(expected) == expected


def test_a_prompt_of_which_nothing_is_left_is_refused(encoders):
    with pytest.raises(ValueError, match=r"nothing of prompt .*clean_caption=False"):
        encoders.encode("\u732b", template="high quality, {prompt}")
    assert encoders.encode("\u732b", clean_caption=False).text_mask.sum() == 2
    assert encoders.encode(" ").text_mask.sum() == 1
