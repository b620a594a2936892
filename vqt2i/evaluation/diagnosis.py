"""Which stage of a trained pipeline is the weak one: each is measured against something that knows less than it should.

| stage | weak if |
|---|---|
| image tokenizer | a picture of its patches' mean colours is nearer to the image than its reconstruction |
| GPT | it predicts image ids no better than their frequencies in the training split do |
| text conditioning | captions of other images, or none at all, predict the ids as well as their own do |
| sampling | what it draws is far less likely, by the GPT itself, than real images |

A stage stands on those before it, so the first weak one is to be mended first.

B images, I image ids, K codes
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from vqt2i.config import Config
from vqt2i.data.images import fit_square, to_tensor, to_uint8
from vqt2i.data.shards import DataSet, Split
from vqt2i.errors import ConfigError, DataError
from vqt2i.evaluation.prompts import first_captions
from vqt2i.generation import TextToImage
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.reading import READS
from vqt2i.gpt import GPT, LossWeights, gpt_loss
from vqt2i.gpt.loss import token_nll
from vqt2i.text import TextBatch, pad_texts
from vqt2i.vq.metrics import psnr

StageName = Literal["image tokenizer", "GPT", "text conditioning", "sampling"]
_AT_ONCE = 32
_SURE = 3.0  # standard errors by which captions must help
_FAR = 2.0  # drawn ids may be so many times as surprising as real ones, and _NEAR nats more
_NEAR = 0.5
_LEARNT = 0.9  # share of a batch's loss below which training on that batch alone must bring it
_OVERFIT_RATE = 1e-3


class DiagnosisConfig(Config):
    """n_samples: of each split, measured. n_drawn: of these, drawn and shown. overfit_*: of training on one batch."""

    train_split: str = "train"
    validation_split: str = "val"
    n_samples: int = Field(64, ge=2)
    n_drawn: PositiveInt = 8
    overfit_batch: PositiveInt = 8
    overfit_steps: PositiveInt = 30
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Stage:
    """What was found of a stage: `value` must not be on the wrong side of `bound`; `reason` says both in words."""

    name: StageName
    weak: bool
    value: float
    bound: float
    reason: str


@dataclass(frozen=True)
class Losses:
    """Mean nats per token on validation samples, by what is predicted from what.

    image: with the image's own caption. shuffled: with another's. unconditional: without any. frequencies: what the
    ids' frequencies alone would give. train: as `image`, on training samples. text: of the caption before the image.
    text_from_image: behind it. drawn: of what is drawn, with the caption it was drawn from.
    """

    image: float
    shuffled: float
    unconditional: float
    frequencies: float
    train: float
    text: float
    text_from_image: float
    drawn: float


class Shown(NamedTuple):
    """A sample's pictures, uint8 (height, width, 3): each column of the comparison."""

    caption: str
    image: np.ndarray
    reconstruction: np.ndarray
    teacher_forced: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True)
class Diagnosis:
    """All that was measured. psnr, patch_psnr: dB, of reconstructions and of patches' mean colours.

    shuffled_z: by how many standard errors captions of other images are worse. by_position: loss of each place of the
    grid. overfit: image loss of one batch, before each step of training on it.
    """

    stages: tuple[Stage, ...]
    losses: Losses
    psnr: float
    patch_psnr: float
    code_usage: float
    shuffled_z: float
    by_position: np.ndarray
    overfit: tuple[float, ...]
    shown: tuple[Shown, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it but the pictures, as plain JSON values."""
        values = asdict(replace(self, by_position=None, shown=()))
        del values["shown"]
        captions = [shown.caption for shown in self.shown]
        return {"verdict": self.verdict} | values | {"by_position": self.by_position.tolist(), "captions": captions}

    @property
    def weakest(self) -> Stage | None:
        """The first weak stage; None if none is."""
        return next((stage for stage in self.stages if stage.weak), None)

    @property
    def verdict(self) -> str:
        """A sentence that names the weak stage, with the reason."""
        if self.weakest is None:
            return "No stage is broken."
        return f"The {self.weakest.name} is the weak stage: {self.weakest.reason}."


class _Samples(NamedTuple):
    image_B3HW: Tensor
    ids_BHW: Tensor
    captions: list[str]
    texts: list[list[int]]


def diagnose(
    pipeline: TextToImage, dataset: DataSet, config: DiagnosisConfig, on_stage: Callable[[str], None] | None = None
) -> Diagnosis:
    """Measure every stage of a pipeline on a data set like the one that it was trained on.

    Raises:
        ConfigError: its GPT does not draw from texts alone.
        DataError: a split that is not there, or of fewer than two captioned images.
    """
    tell = on_stage or (lambda _: None)
    gpt = pipeline.gpt
    if not gpt.layout.has_both_orders:
        read = READS[gpt.layout.condition.kind]
        raise ConfigError(f"diagnosis: this GPT reads {read}; expected one that reads texts")
    tell("image tokenizer")
    train, val = (
        _read(pipeline, dataset.split(name), config.n_samples) for name in (config.train_split, config.validation_split)
    )
    reconstruction = _decode(pipeline, val.ids_BHW)
    decibel = float(psnr(val.image_B3HW, reconstruction).mean())
    patch_px = max(2, pipeline.vq.config.downsample)  # of a palette, whose patches are pixels, four of them
    patch_decibel = float(psnr(val.image_B3HW, _patch_means(val.image_B3HW, patch_px)).mean())
    tell("GPT")
    own, likeliest_BI = _teacher_forced(gpt, val.ids_BHW, val.texts)
    shuffled, _ = _teacher_forced(gpt, val.ids_BHW, _others(val))
    none, _ = _teacher_forced(gpt, val.ids_BHW, [[] for _ in val.texts])
    difference_B = (shuffled - own).mean(1)
    shuffled_z = float(difference_B.mean() / (difference_B.std() / len(difference_B) ** 0.5).clamp_min(1e-9))
    text, text_from_image = _text_losses(gpt, val)
    tell("sampling")
    drawn = _draw(pipeline, val, config)
    drawn_nll, _ = _teacher_forced(gpt, drawn, val.texts[: config.n_drawn])
    losses = Losses(
        image=float(own.mean()), shuffled=float(shuffled.mean()), unconditional=float(none.mean()),
        frequencies=_frequency_loss(train.ids_BHW, val.ids_BHW, pipeline.vq.config.vocab_size),
        train=float(_teacher_forced(gpt, train.ids_BHW, train.texts)[0].mean()), text=text,
        text_from_image=text_from_image, drawn=float(drawn_nll.mean()),
    )  # fmt: skip
    tell("one batch")
    overfit = _overfit(gpt, train, config)
    stages = (
        _judge_tokenizer(decibel, patch_decibel),
        _judge_gpt(losses, overfit),
        _judge_conditioning(losses, shuffled_z),
        _judge_sampling(losses),
    )
    n, grid = config.n_drawn, val.ids_BHW.shape[1:]
    columns = (
        to_uint8(pictures)
        for pictures in (
            val.image_B3HW[:n], reconstruction[:n], _decode(pipeline, likeliest_BI[:n].unflatten(1, grid)),
            _decode(pipeline, drawn),
        )
    )  # fmt: skip
    return Diagnosis(
        stages, losses, decibel, patch_decibel,
        code_usage=len(torch.cat((train.ids_BHW, val.ids_BHW)).unique()) / pipeline.vq.config.vocab_size,
        shuffled_z=shuffled_z, by_position=own.mean(0).unflatten(0, grid).numpy(), overfit=overfit,
        shown=tuple(map(Shown, val.captions[:n], *columns)),
    )  # fmt: skip


# --- judging ---


def _judge_tokenizer(decibel: float, patch_decibel: float) -> Stage:
    weak = not decibel > patch_decibel
    than = "less than" if weak else "more than"
    reason = f"its reconstructions have {decibel:.1f} dB, {than} its patches' mean colours ({patch_decibel:.1f} dB)"
    return Stage("image tokenizer", weak, decibel, patch_decibel, reason)


def _judge_gpt(losses: Losses, overfit: Sequence[float]) -> Stage:
    # a GPT that was never trained without captions is judged with them
    value = min(losses.unconditional, losses.image)
    weak = not value < losses.frequencies
    than = "no better than" if weak else "better than"
    reason = (f"it predicts image ids with {value:.2f} nats, {than} their frequencies in the training split do "
              f"({losses.frequencies:.2f})")  # fmt: skip
    if weak and not overfit[-1] < _LEARNT * overfit[0]:
        reason += f"; on one batch alone its loss goes from {overfit[0]:.2f} to {overfit[-1]:.2f}: it does not learn"
    elif weak:
        reason += (f"; on one batch alone its loss falls from {overfit[0]:.2f} to {overfit[-1]:.2f}: it can learn, so "
                   "train it longer")  # fmt: skip
    return Stage("GPT", weak, value, losses.frequencies, reason)


def _judge_conditioning(losses: Losses, shuffled_z: float) -> Stage:
    unrelated = not shuffled_z > _SURE
    misleading = losses.image > losses.unconditional
    reason = (f"with its own caption an image id costs {losses.image:.2f} nats, with another image's "
              f"{losses.shuffled:.2f} ({shuffled_z:.1f} standard errors apart), without any "
              f"{losses.unconditional:.2f}")  # fmt: skip
    if unrelated or misleading:
        reason += ": it does not understand captions"
    return Stage("text conditioning", unrelated or misleading, shuffled_z, _SURE, reason)


def _judge_sampling(losses: Losses) -> Stage:
    bound = _FAR * losses.image + _NEAR
    weak = not losses.drawn <= bound
    reason = f"what it draws costs {losses.drawn:.2f} nats an id by the GPT itself, real images {losses.image:.2f}"
    if weak:
        reason += ": sampling is too wild; lower the temperature or guidance, or set top_k or top_p"
    return Stage("sampling", weak, losses.drawn, bound, reason)


# --- measuring ---


def _read(pipeline: TextToImage, split: Split, n: int) -> _Samples:
    """The first `n` images of a split that have captions, each with one of them, a language each in turn."""
    found = list(first_captions(split, n))
    if len(found) < 2:
        raise DataError(f"a split of {len(split)} samples, {len(found)} of them with captions: expected 2 or more")
    images = [fit_square(split[index].image_HW3, pipeline.vq.config.image_size_px) for index, _, _ in found]
    captions = [caption for _, _, caption in found]
    image_B3HW = to_tensor(np.stack(images))
    ids = [pipeline.vq.encode(part.to(pipeline.gpt.device)).cpu() for part in image_B3HW.split(_AT_ONCE)]
    return _Samples(image_B3HW, torch.cat(ids), captions, [pipeline.text.encode(text) for text in captions])


def _decode(pipeline: TextToImage, ids_BHW: Tensor) -> Tensor:
    parts = [pipeline.vq.decode(part.to(pipeline.gpt.device)).float().cpu() for part in ids_BHW.split(_AT_ONCE)]
    return torch.cat(parts)


def _patch_means(image_B3HW: Tensor, patch_px: int) -> Tensor:
    return F.interpolate(F.avg_pool2d(image_B3HW, patch_px), scale_factor=patch_px)


def _others(samples: _Samples) -> list[list[int]]:
    """Of each image the caption of the next one that has another."""
    texts = samples.texts
    n = len(texts)
    return [
        next((texts[(i + k) % n] for k in range(1, n) if texts[(i + k) % n] != text), text)
        for i, text in enumerate(texts)
    ]


@torch.inference_mode()
def _teacher_forced(gpt: GPT, ids_BHW: Tensor, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """The loss of each image id, all before it given, and the likeliest id there, (B, I) each on the CPU."""
    losses, likeliest = [], []
    for start in range(0, len(texts), _AT_ONCE):
        image_BI = ids_BHW[start : start + _AT_ONCE].flatten(1).to(gpt.device)
        sequences = gpt.layout.join(_as_batch(gpt, texts[start : start + _AT_ONCE]), image_BI)
        hidden = gpt(sequences.until(-1))
        logits = gpt.image_logits(hidden[:, gpt.layout.image_targets(reversed_order=False)])
        losses.append(token_nll(logits, image_BI)[0].cpu())
        likeliest.append(logits.argmax(-1).cpu())
    return torch.cat(losses), torch.cat(likeliest)


@torch.inference_mode()
def _text_losses(gpt: GPT, samples: _Samples) -> tuple[float, float]:
    """Of captions before the image and behind it."""
    sums = np.zeros(2)
    for start in range(0, len(samples.texts), _AT_ONCE):
        image_BI = samples.ids_BHW[start : start + _AT_ONCE].flatten(1).to(gpt.device)
        text = _as_batch(gpt, samples.texts[start : start + _AT_ONCE])
        forth = gpt_loss(gpt, text, image_BI, 0, LossWeights()).text
        back = gpt_loss(gpt, text, image_BI, len(image_BI), LossWeights()).text_from_image
        sums += len(image_BI) * np.array([float(forth), float(back)])
    text_loss, text_from_image = sums / len(samples.texts)
    return float(text_loss), float(text_from_image)


def _draw(pipeline: TextToImage, samples: _Samples, config: DiagnosisConfig) -> Tensor:
    jobs = [Job(tuple(text), i, 0) for i, text in enumerate(samples.texts[: config.n_drawn])]
    return decode_image_ids(pipeline.gpt, jobs, pipeline.config.sampling, config.seed)


def _frequency_loss(train_BHW: Tensor, val_BHW: Tensor, n_codes: int) -> float:
    """Cross-entropy of validation ids by their frequencies in training, each id counted once more than it occurs."""
    counts_K = torch.bincount(train_BHW.flatten(), minlength=n_codes) + 1
    log_p_K = (counts_K / counts_K.sum()).log()
    return float(-log_p_K[val_BHW.flatten()].mean())


def _overfit(gpt: GPT, samples: _Samples, config: DiagnosisConfig) -> tuple[float, ...]:
    """Image loss of a batch before each step of training a copy on it, and after the last."""
    model = copy.deepcopy(gpt).float().train()
    text = _as_batch(model, samples.texts[: config.overfit_batch])
    image_BI = samples.ids_BHW[: config.overfit_batch].flatten(1).to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_OVERFIT_RATE)
    losses = []
    for step in range(config.overfit_steps + 1):
        loss = gpt_loss(model, text, image_BI, 0, LossWeights())
        losses.append(float(loss.image.detach()))
        if step < config.overfit_steps:
            optimizer.zero_grad()
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return tuple(losses)


def _as_batch(gpt: GPT, texts: Sequence[list[int]]) -> TextBatch:
    return TextBatch(*(t.to(gpt.device) for t in pad_texts(list(texts), gpt.layout.config.text_length)))
