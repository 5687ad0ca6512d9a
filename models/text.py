"""What the denoiser sees of a prompt: T5's tokens, and one vector of CLIP's.

Each prompt is encoded by itself, once, so it comes out the same whatever its neighbours; then the
encoders may be freed. Everything is loaded from a folder; nothing is downloaded.
"""

from __future__ import annotations

import html
import logging
import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

TEXT_LENGTH = 512  # T5 tokens
POOLED_LENGTH = 77  # CLIP tokens
PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")  # folders of a pipeline

_MEDIA = "png|jpe?g|gif|bmp|webp|tiff?|svg|mp4|avi|mov|mkv|webm|mp3|wav|pdf|zip"

# In this order, on text in lower case.
_told: set[int] = set()  # lengths of encoders for which a cut prompt was warned of

_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"</?[a-z][^<>]*>", " "),  # tags
        (r"(?:https?://|www\.)\S+", " "),  # addresses
        (r"(?<![\w.])@\w+", " "),  # handles
        ("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]+", " "),
        ("[\u2010-\u2015\u2212\u2e3a\u2e3b]", "-"),
        ("[\u201c-\u201f\u00ab\u00bb]", '"'),
        ("[\u2018-\u201b\u0060\u00b4]", "'"),
        (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", " "),  # IP numbers
        (r"#\d+\b|\b\d{6,}\b", " "),  # article numbers and the like
        (rf"\b[\w-]+\.(?:{_MEDIA})\b", " "),  # file names
        (r"\bpage \d+\b|\b(?:worldwide )?free shipping\b", " "),
        (r"\s+", " "),
    )
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """What :meth:`TextEncoders.encode` returns, and a pipeline takes in place of prompts."""

    text: Tensor  # [B, L, D]; zero where text_mask is False
    text_mask: Tensor  # [B, L], bool, True = attend
    pooled: Tensor  # [B, P]

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextEmbeddings:
        """The same on ``device``, ``text`` and ``pooled`` in ``dtype``."""
        return replace(
            self,
            text=self.text.to(device, dtype),
            text_mask=self.text_mask.to(device),
            pooled=self.pooled.to(device, dtype),
        )

    def repeated(self, times: int) -> TextEmbeddings:
        """Each prompt so many times, one after the other."""
        return TextEmbeddings(
            *(x.repeat_interleave(times, 0) for x in (self.text, self.text_mask, self.pooled))
        )

    @staticmethod
    def cat(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """All the prompts of ``parts``, in order; shorter texts are padded to the longest."""
        length = max(part.text.shape[1] for part in parts)
        return TextEmbeddings(
            torch.cat([functional.pad(p.text, (0, 0, 0, length - p.text.shape[1])) for p in parts]),
            torch.cat(
                [functional.pad(p.text_mask, (0, length - p.text_mask.shape[1])) for p in parts]
            ),
            torch.cat([p.pooled for p in parts]),
        )


class TextEncoders:
    """T5 v1.1 and CLIP with its projection, used once a prompt.

    The released SUV has T5 v1.1 XL (D = 2048, 512 tokens) and the text tower of CLIP ViT-bigG-14
    (P = 1280, 77 tokens). Embeddings are kept in memory by prompt, on the CPU.

    Args:
        tokenizer, encoder: T5's; None if the prompts to come were encoded before.
        tokenizer_2, encoder_2: CLIP's.

    Attributes:
        tokenizer, encoder, tokenizer_2, encoder_2: the four, now; see :meth:`take`.

    Source: Open-Sora Plan v1.5 report, "text encoders".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        encoder: T5EncoderModel | None,
        tokenizer_2: PreTrainedTokenizerBase | None,
        encoder_2: CLIPTextModelWithProjection | None,
    ) -> None:
        self._cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._made_by: list[Any] = [None] * len(PARTS)  # which four, weakly, so that they may go
        self.take(tokenizer, encoder, tokenizer_2, encoder_2)

    def take(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        encoder: T5EncoderModel | None,
        tokenizer_2: PreTrainedTokenizerBase | None,
        encoder_2: CLIPTextModelWithProjection | None,
    ) -> None:
        """Encode with these from now on.

        What was encoded before is forgotten where one is another than it was; one that is None has
        gone, and what it made stays.
        """
        parts = tokenizer, encoder, tokenizer_2, encoder_2
        self.tokenizer, self.encoder, self.tokenizer_2, self.encoder_2 = parts
        before = [part and part() for part in self._made_by]
        if any(new is not None and new is not old for new, old in zip(parts, before, strict=True)):
            self._cache.clear()
            self._made_by = [None if part is None else weakref.ref(part) for part in parts]

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
    ) -> TextEncoders:
        """Load from the folders that a pipeline keeps them in.

        Args:
            path: holds ``tokenizer``, ``text_encoder`` (T5), ``tokenizer_2`` and
                ``text_encoder_2`` (CLIP).
            dtype: of the weights and the embeddings.

        Raises:
            FileNotFoundError: if one of the four folders is not there.
            ValueError: if a file lacks weights, where transformers would make some up.
        """
        folders = [Path(path) / part for part in PARTS]
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"no text encoder in {os.fspath(path)!r}: {folder} is none")
        return cls(
            AutoTokenizer.from_pretrained(folders[0], local_files_only=True),
            load_encoder(T5EncoderModel, folders[1], dtype),
            AutoTokenizer.from_pretrained(folders[2], local_files_only=True),
            load_encoder(CLIPTextModelWithProjection, folders[3], dtype),
        )

    def encode(
        self,
        prompts: str | Sequence[str],
        *,
        template: str = "{prompt}",
        clean_caption: bool = True,
        max_sequence_length: int = TEXT_LENGTH,
    ) -> TextEmbeddings:
        """The embeddings of ``prompts``, on the CPU, in the encoders' dtype.

        Prompts longer than an encoder takes are cut; the log warns of the first.

        Args:
            prompts: one or several; ``""`` stands for no prompt.
            template: put around each, at ``{prompt}``.
            clean_caption: whether prompts go through :func:`clean`, as those of the training did.
            max_sequence_length: tokens of T5 that a prompt is cut and padded to, at most the 512
                that the released SUV was trained with.

        Raises:
            ValueError: if there are no prompts, the template has no place for one, one holds what
                is no character or cleaning left nothing of it, or one is new and the encoders have
                been freed; for another length.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts is empty; give at least one, '' for none in particular")
        if "{prompt}" not in template:
            raise ValueError(f"template must contain {{prompt}}, got {template!r}")
        most = max_sequence_length
        if not isinstance(most, int) or not 1 <= most <= TEXT_LENGTH:
            raise ValueError(
                f"max_sequence_length must be from 1 to {TEXT_LENGTH} tokens of T5, got {most!r}"
            )
        for prompt in prompts:  # before any of them is cleaned
            check_text(prompt)
        texts = [cleaned(prompt) if clean_caption else prompt for prompt in prompts]
        rows = [self._row(template.replace("{prompt}", text), most) for text in texts]
        lengths = torch.tensor([len(text) for text, _ in rows])
        return TextEmbeddings(
            torch.stack([functional.pad(t, (0, 0, 0, most - len(t))) for t, _ in rows]),
            torch.arange(most) < lengths[:, None],
            torch.stack([pooled for _, pooled in rows]),
        )

    def free(self) -> None:
        """Let go of the encoders; prompts encoded before are still served."""
        self.encoder = self.encoder_2 = None

    def _row(self, prompt: str, most: int) -> tuple[Tensor, Tensor]:
        """T5's states of the real tokens, ``[length, D]``, and CLIP's vector, ``[P]``."""
        if (prompt, most) not in self._cache:
            self._cache[prompt, most] = self._encode(prompt, most)
        return self._cache[prompt, most]

    @torch.inference_mode(False)  # or what is kept could not be trained on
    @torch.no_grad()
    def _encode(self, prompt: str, most: int) -> tuple[Tensor, Tensor]:
        t5, clip = self.encoder, self.encoder_2
        if t5 is None or clip is None or self.tokenizer is None or self.tokenizer_2 is None:
            raise ValueError(
                f"prompt {prompt!r} was not encoded before and the text encoders are gone; encode "
                "it before they are freed, or load them again"
            )
        ids, mask = _tokens(self.tokenizer, prompt, most)
        device = get_module_execution_device(t5)  # where its weights come to, if they move
        states = t5(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        ids, _ = _tokens(self.tokenizer_2, prompt, POOLED_LENGTH)
        pooled = clip(input_ids=ids.to(get_module_execution_device(clip))).text_embeds
        return states[0].cpu()[mask[0].bool()], pooled[0].cpu()


def clean(prompt: str) -> str:
    """A prompt as the captions of the training look: lower case, without what is not language.

    Takes out tags, web addresses, handles, CJK characters (T5 v1.1 knows none), IP numbers, numbers
    of six digits and more or behind ``#``, names of media files, "page 3" and "free shipping";
    resolves HTML entities; makes all dashes ``-``, all quotes ``"`` and ``'``, all white space one
    space. Wrongly decoded text is not repaired, which the original did with ftfy.

    Source: the text preparation of Open-Sora Plan v1.5, which follows DeepFloyd IF's.
    """
    text = html.unescape(html.unescape(prompt)).lower()
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text.strip()


def cleaned(prompt: str) -> str:
    """As :func:`clean`; ValueError if that leaves nothing of a prompt, or it is no text."""
    check_text(prompt)
    text = clean(prompt)
    if prompt.strip() and not text:
        raise ValueError(
            f"cleaning leaves nothing of prompt {prompt!r}; say it in English, or pass "
            "clean_caption=False"
        )
    return text


def check_text(prompt: str) -> None:
    """ValueError if ``prompt`` holds half a character, which no file or tokenizer takes."""
    wrong = [f"U+{ord(letter):04X}" for letter in prompt if 0xD800 <= ord(letter) <= 0xDFFF]
    if wrong:
        raise ValueError(
            f"prompt {prompt!a} holds {', '.join(wrong[:3])}, which is no character: text that "
            "was not UTF-8, or half of a pair; write it anew"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 ``[1, length]``."""
    wanted = len(tokenizer(prompt, verbose=False)["input_ids"])
    if wanted > length and length not in _told:
        _told.add(length)
        logger.warning(
            "a prompt of %d tokens is cut to the %d an encoder takes, and so will others be: %r",
            wanted,
            length,
            prompt,
        )
    tokens = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


def load_encoder(kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> Any:
    """A text encoder from ``folder``; ValueError if the files there lack some of its weights."""
    return _load(kind, folder, dtype=dtype)


def check_encoder(kind: type[PreTrainedModel], folder: Path, variant: str | None = None) -> None:
    """ValueError as of :func:`load_encoder`, without the memory and the time to load it.

    Args:
        kind: its class.
        folder: where it is.
        variant: of the names of its files, such as ``"fp16"``.
    """
    _load(kind, folder, device_map="meta", variant=variant)


def _load(kind: type[PreTrainedModel], folder: Path, **options: Any) -> Any:
    model, info = kind.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{folder} lacks weights of {kind.__name__}, or has them in other shapes: "
            f"{', '.join(sorted(map(str, wrong))[:10])}"
        )
    return model.eval()
