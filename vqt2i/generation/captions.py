"""Texts from images: each image is read once, in the order image → text, and shared by all its beams or samples.

B images, K rows of each (beams or samples), V text ids and EOT, S longest text
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from vqt2i.config import Config
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.errors import CheckpointError, DataError, PromptError
from vqt2i.generation.rerank import likelihood_scores
from vqt2i.generation.sampling import keep_likeliest, pick
from vqt2i.gpt import GPT
from vqt2i.nn.cache import BranchedCache, Branches
from vqt2i.runtime import stream_seed
from vqt2i.text import TextTokenizer
from vqt2i.vq import AnyImageTokenizer

CAPTION_LENGTH = 20  # where nothing ends a text: CogView's, in its published code
ROWS_AT_ONCE = 256  # of ids; of whole sequences a quarter. Bounds the memory, changes no text


class BeamConfig(Config):
    """The likeliest texts that a beam search finds.

    length_exponent: texts are compared by log p / nᵃ for n ids, EOT counted. 1 is log p per token, the caption score;
        0 is log p itself, which prefers short texts (Wu et al. 2016, arXiv 1609.08144, equation 14, has (5 + n) / 6).
    rerank: whether the texts found are put in the order of log p(image | text) + w · log p(text | image): the GPT is
        asked how well it would draw the image from each (a noisy channel: Yu et al. 2017, arXiv 1611.02554, equ. 4).
    text_weight: w. Many beams and a rerank find texts that training has seen seldom or never: these are far down among
        the likeliest.
    n_ids: of every text, where nothing ends one; null is `CAPTION_LENGTH`.
    """

    n_beams: PositiveInt = 64
    length_exponent: float = Field(0.5, ge=0, le=10)
    rerank: bool = True
    text_weight: float = Field(2.0, ge=0)
    n_ids: PositiveInt | None = None


class DrawConfig(Config):
    """Texts drawn id by id. temperature divides logits. top_p: null keeps everything. n_ids: as in `BeamConfig`."""

    temperature: PositiveFloat = Field(1.0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n_ids: PositiveInt | None = None


@dataclass(frozen=True)
class ImageCaption:
    """A text for an image.

    log_p: log p(text | image) per token in nats, EOT counted. image_log_p: log p(image | text) per image token, where
    texts were reranked.
    """

    text: str
    log_p: float
    ids: tuple[int, ...]
    image_index: int
    image_log_p: float | None = None


class Found(NamedTuple):
    """A text's ids, log p(text | image) of them and EOT together, how many these are (no EOT where nothing ends a
    text), and log p(image | text) where it was asked for."""

    ids: tuple[int, ...]
    log_p: float
    n_scored: int
    image_log_p: float | None = None

    @property
    def per_token(self) -> float:
        return self.log_p / self.n_scored


def require_reads_images(folder: Path, card: dict[str, Any]) -> None:
    """Check by its card that a GPT was trained on the order image → text; a card that does not say is believed.

    Raises:
        CheckpointError: it was not.
    """
    if reversed_share_of(card) == 0:
        raise CheckpointError(f"{folder}: trained with training.reversed_share 0, so it never saw a text behind an "
                              "image and cannot caption; train with a reversed_share above 0 (0.15)")  # fmt: skip


def reversed_share_of(card: dict[str, Any]) -> float | None:
    """The share of image → text in a GPT's training, or in that of the GPT which it started from; None: not known."""
    return card.get("reversed_share", card.get("config", {}).get("training", {}).get("reversed_share"))


def caption_images(
    text: TextTokenizer,
    vq: AnyImageTokenizer,
    gpt: GPT,
    images: Sequence[np.ndarray | Image.Image],
    *,
    n: int,
    how: BeamConfig | DrawConfig,
    seed: int,
) -> list[list[ImageCaption]]:
    """See `TextToImage.caption`."""
    if how.n_ids and not gpt.layout.has_pairs:
        raise PromptError(f"captions of {how.n_ids} ids: this GPT says itself where a text ends; leave n_ids out")
    most = how.n_beams if isinstance(how, BeamConfig) else n
    if not 1 <= n <= most:
        raise PromptError(f"captions of an image: found {n}, expected 1 or more, and at most as many as beams "
                          f"({most})")  # fmt: skip
    pixels = [fit_square(_as_array(image, index), vq.config.image_size_px) for index, image in enumerate(images)]
    at_once, captions = max(1, ROWS_AT_ONCE // most), []
    for start in range(0, len(pixels), at_once):
        image_B3HW = to_tensor(np.stack(pixels[start : start + at_once])).to(gpt.device)
        image_BI = vq.encode(image_B3HW).flatten(1)
        if isinstance(how, DrawConfig):
            seeds = [(seed, start + row) for row in range(len(image_BI))]
            groups = draw_texts(gpt, image_BI, n, how, seeds)
        elif how.rerank:
            groups = rerank(gpt, image_BI, beam_search(gpt, image_BI, how.n_beams, how), how.text_weight)
        else:
            groups = beam_search(gpt, image_BI, n, how)
        for number, found in enumerate(groups, start):
            captions.append([_as_caption(text, one, number, image_BI.shape[1]) for one in found[:n]])
    return captions


def _as_caption(text: TextTokenizer, found: Found, number: int, n_image_ids: int) -> ImageCaption:
    image_log_p = None if found.image_log_p is None else found.image_log_p / n_image_ids
    return ImageCaption(text.decode(list(found.ids)), found.per_token, found.ids, number, image_log_p)


def _as_array(image: np.ndarray | Image.Image, index: int) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise DataError(f"image {index}: expected uint8 (height, width, 3), found {pixels.dtype} {pixels.shape}")
    return pixels


@torch.inference_mode()
def beam_search(gpt: GPT, image_BI: Tensor, n: int, config: BeamConfig) -> list[list[Found]]:
    """The best `n` texts of each image, best first; with as many beams as there are texts, of all texts.

    At each length the `n_beams` likeliest beginnings go on. A text counts once EOT is behind it, and the search ends
    when no beginning can come to a text that is better than the `n` best. Where nothing ends a text, all have as many
    ids.
    """
    layout, K = gpt.layout, config.n_beams
    logits_BV, cache = _read_images(gpt, image_BI, K)
    B, S = len(image_BI), _longest(gpt, config)
    ids_BKS = image_BI.new_zeros(B, K, 0)
    log_p_BK = torch.full((B, K), -torch.inf, device=image_BI.device)
    log_p_BK[:, 0] = 0  # all beams begin alike: one of them stands for all
    done: list[list[Found]] = [[] for _ in range(B)]
    logits_BKV = logits_BV.unflatten(0, (B, K))
    for length in range(S + 1):
        total_BKV = log_p_BK[..., None] + logits_BKV.float().log_softmax(-1)
        ends_BK = log_p_BK if layout.has_pairs else total_BKV[..., layout.eot]
        for row, texts in enumerate(done if length == S or not layout.has_pairs else ()):
            real = zip(ids_BKS[row].tolist(), ends_BK[row].tolist(), strict=True)
            texts += [_found(gpt, ids, log_p) for ids, log_p in real if log_p > -torch.inf]
            texts.sort(key=lambda found: -_value(found, config))
            del texts[n:]
        # all that follows has a smaller log p, divided by at most the length of the longest text
        log_p_BK, chosen_BK = total_BKV[..., : layout.eot].flatten(1).topk(K)
        best_B = (log_p_BK[:, 0] / (S + 1) ** config.length_exponent).tolist()
        if length == S or all(
            len(texts) == n and _value(texts[-1], config) >= best for texts, best in zip(done, best_B, strict=True)
        ):
            break
        beam_BK, id_BK = chosen_BK // layout.eot, chosen_BK % layout.eot
        before_BKS = ids_BKS.gather(1, beam_BK[..., None].expand(-1, -1, length))
        ids_BKS = torch.cat((before_BKS, id_BK[..., None]), dim=-1)
        cache.follow((beam_BK + torch.arange(B, device=beam_BK.device)[:, None] * K).flatten())
        logits_BKV = gpt.step_text(id_BK.reshape(-1, 1), cache).unflatten(0, (B, K))
    return done


def _value(found: Found, config: BeamConfig) -> float:
    return found.log_p / found.n_scored**config.length_exponent


def _found(gpt: GPT, ids: Sequence[int], log_p: float) -> Found:
    return Found(tuple(ids), log_p, len(ids) + (not gpt.layout.has_pairs))


def _longest(gpt: GPT, config: BeamConfig | DrawConfig) -> int:
    """Of texts, in ids; where nothing ends one, of all."""
    longest = gpt.layout.config.text_length
    return min(config.n_ids or CAPTION_LENGTH, longest) if gpt.layout.has_pairs else longest


@torch.inference_mode()
def draw_texts(
    gpt: GPT, image_BI: Tensor, n: int, config: DrawConfig, seeds: Sequence[tuple[object, ...]]
) -> list[list[Found]]:
    """`n` texts of each image, likeliest first. A text depends on its image, its image's `seeds` and its number."""
    layout = gpt.layout
    B, S = len(image_BI), _longest(gpt, config)
    uniform_RS = torch.from_numpy(np.stack([
        np.random.default_rng(stream_seed("caption", *seeds[b], k)).random(S) for b in range(B) for k in range(n)
    ])).to(image_BI.device)  # fmt: skip
    logits_RV, cache = _read_images(gpt, image_BI, n)
    ids_RS = image_BI.new_zeros(B * n, 0)
    log_p_R = torch.zeros(B * n, device=image_BI.device)
    ended_R = torch.zeros(B * n, dtype=torch.bool, device=image_BI.device)
    for length in range(S + (not layout.has_pairs)):
        log_p_RV = logits_RV.float().log_softmax(-1)
        choices_RV = log_p_RV[:, : layout.eot] if layout.has_pairs else log_p_RV
        if length < S:
            id_R = pick(keep_likeliest(choices_RV / config.temperature, None, config.top_p), uniform_RS[:, length])
        else:
            id_R = torch.full_like(ids_RS[:, 0], layout.eot)
        log_p_R += log_p_RV.gather(1, id_R[:, None]).squeeze(1).masked_fill(ended_R, 0)
        id_R = id_R.masked_fill(ended_R, layout.eot)
        ended_R |= id_R == layout.eot
        ids_RS = torch.cat((ids_RS, id_R[:, None]), dim=1)
        if ended_R.all() or (layout.has_pairs and length + 1 == S):
            break
        logits_RV = gpt.step_text(id_R[:, None], cache)
    rows = [_found(gpt, ids[: ids.index(layout.eot)] if layout.eot in ids else ids, log_p)
            for ids, log_p in zip(ids_RS.tolist(), log_p_R.tolist(), strict=True)]  # fmt: skip
    groups = [rows[start : start + n] for start in range(0, B * n, n)]
    return [sorted(group, key=lambda found: -found.per_token) for group in groups]


@torch.inference_mode()
def rerank(gpt: GPT, image_BI: Tensor, groups: Sequence[Sequence[Found]], text_weight: float) -> list[list[Found]]:
    """The texts of each image in the order of log p(image | text) + text_weight · log p(text | image)."""
    rows = [(row, found.ids) for row, group in enumerate(groups) for found in group]
    values: list[float] = []
    for start in range(0, len(rows), ROWS_AT_ONCE // 4):
        numbers, texts = zip(*rows[start : start + ROWS_AT_ONCE // 4], strict=True)
        values += (image_BI.shape[1] * likelihood_scores(gpt, image_BI[list(numbers)], texts)).tolist()
    scores = iter(values)
    scored = [[found._replace(image_log_p=next(scores)) for found in group] for group in groups]
    return [sorted(group, key=lambda found: -(found.image_log_p + text_weight * found.log_p)) for group in scored]


def _read_images(gpt: GPT, image_BI: Tensor, n_each: int) -> tuple[Tensor, BranchedCache]:
    """The logits of the first text id for `n_each` rows of each image, (B * n_each, V), and their cache."""
    prefix = gpt.layout.image_prefix(image_BI)
    logits_BV, cache = gpt.prefill(prefix, reversed_order=True)
    branches = Branches(cache, prefix.real_BL, n_each, gpt.layout.config.text_length)
    return logits_BV.repeat_interleave(n_each, dim=0), BranchedCache([branches])
