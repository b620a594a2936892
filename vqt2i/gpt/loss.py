"""The training loss of the GPT and the caption score, both from split heads that never build text × image logits.

B batch, L positions of one modality, V its vocabulary
"""

from typing import NamedTuple

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from vqt2i.config import Config
from vqt2i.gpt.condition import ConditionBatch
from vqt2i.gpt.model import GPT
from vqt2i.nn.cache import BranchedCache
from vqt2i.text.batch import TextBatch


class LossWeights(Config):
    """Weight of each part: a modality in one order; z: of the squared log-partition (PaLM, Chowdhery 2022, §5)."""

    image: NonNegativeFloat = 1.0
    text: NonNegativeFloat = 0.1
    text_from_image: NonNegativeFloat = 1.0
    image_unconditional: NonNegativeFloat = 0.1
    z: NonNegativeFloat = 1e-4


class GPTLoss(NamedTuple):
    """Mean nats per token of each part (NaN where the batch has no row of that order), and their weighted sum.

    text: 0 where it is seen in full and so not predicted.
    """

    total: Tensor
    image: Tensor
    text: Tensor
    text_from_image: Tensor
    image_unconditional: Tensor


def gpt_loss(
    gpt: GPT, condition: ConditionBatch, image_BI: Tensor, n_reversed: int, weights: LossWeights,
    read_BI: Tensor | None = None,
) -> GPTLoss:  # fmt: skip
    """Loss of a batch whose first `n_reversed` rows are read image → text and the others condition → image.

    In the reversed order the image comes first, so its loss is that of an unconditional image model. A GPT without that
    order has no rows reversed; a condition that is not a text alone is never predicted either, so that of the loss
    there is the image's part alone.

    Args:
        read_BI: the ids that are read where `image_BI` are to be predicted; None reads the same.
    """
    read_BI = image_BI if read_BI is None else read_BI
    if not gpt.layout.has_both_orders:
        assert n_reversed == 0
        return _loss_in_one_order(gpt, condition, image_BI, weights, read_BI)
    text: TextBatch = condition
    layout, n = gpt.layout, n_reversed
    back = layout.join_reversed(TextBatch(*(t[:n] for t in text)), read_BI[:n])
    forth = layout.join(TextBatch(*(t[n:] for t in text)), read_BI[n:])
    whole = back.cat(forth)
    hidden = gpt(whole.until(-1))

    image_at = {order: layout.image_targets(reversed_order=order) for order in (True, False)}
    image_hidden = torch.cat((hidden[:n, image_at[True]], hidden[n:, image_at[False]]))
    image_nll, image_z = token_nll(gpt.image_logits(image_hidden), image_BI)

    # in one row, for with paired marks one order has an EOT more
    text_at = {order: layout.text_targets(reversed_order=order) for order in (True, False)}
    text_hidden = torch.cat((hidden[:n, text_at[True]].flatten(0, 1), hidden[n:, text_at[False]].flatten(0, 1)))
    target_pairs = (_shifted(back.ids_BL, text_at[True]), _shifted(forth.ids_BL, text_at[False]))
    targets = torch.cat([ids.flatten() for ids in target_pairs])
    counts = targets <= layout.eot  # not for padding, nor for the mark behind left padding
    m = target_pairs[0].numel()
    if not layout.predicts_prompts:
        counts[m:] = False
    (text_nll,), (text_z,) = token_nll(gpt.text_logits(text_hidden[None]), targets[None].clamp_max(layout.eot))
    parts = {
        "image": _mean(image_nll[n:]),
        "text": _mean(text_nll[m:], counts[m:]),
        "text_from_image": _mean(text_nll[:m], counts[:m]),
        "image_unconditional": _mean(image_nll[:n]),
    }
    # each order weighs as much as its share of the rows
    shares = {"image": 1 - n / len(image_BI), "text_from_image": n / len(image_BI)}
    shares |= {"text": shares["image"], "image_unconditional": shares["text_from_image"]}
    total = weights.z * (_mean(image_z) + _mean(text_z, counts))
    for name, value in parts.items():
        if shares[name]:
            total = total + getattr(weights, name) * shares[name] * value
    return GPTLoss(total=total, **parts)


def _loss_in_one_order(
    gpt: GPT, condition: ConditionBatch, image_BI: Tensor, weights: LossWeights, read_BI: Tensor
) -> GPTLoss:
    whole = gpt.reader(condition).then(gpt.layout.image_part(read_BI))
    hidden = gpt(whole.until(-1))
    nll, z = token_nll(gpt.image_logits(hidden[:, gpt.layout.image_targets(reversed_order=False)]), image_BI)
    none = nll.new_full((), torch.nan)
    total, text = weights.image * nll.mean() + weights.z * z.mean(), none
    if gpt.layout.predicts_text:
        at, n_ids = gpt.layout.text_targets(reversed_order=False), gpt.layout.first_image_id
        targets = _shifted(whole.ids_BL, at)
        counts = targets < n_ids
        text_nll, text_z = token_nll(gpt.text_logits(hidden[:, at]), targets.clamp_max(n_ids - 1))
        text = _mean(text_nll, counts)
        total = total + weights.text * text + weights.z * _mean(text_z, counts)
    return GPTLoss(total, nll.mean(), text, none, none)


def caption_log_probability(gpt: GPT, text: TextBatch, image_BI: Tensor, cache: BranchedCache | None = None) -> Tensor:
    """log p(text | image) in nats per token, EOT counted, (B,): the caption score of CogView (arXiv 2105.13290, §3.4).

    Dividing by the length lets captions of different lengths be compared. With paired marks there is no EOT, as in
    CogView's own score.

    Args:
        cache: rows that have read the mark I2T and the first ids of the images; they read on. None reads it all.
    """
    sequences = gpt.layout.join_reversed(text, image_BI)
    # behind the longest text is padding only, which nothing before it sees
    start = gpt.layout.text_targets(reversed_order=True).start
    at = slice(start, start + max(1, int(text.n_ids_B.max()) + (not gpt.layout.has_pairs)))
    if cache is None:
        hidden = gpt(sequences.until(at.stop))[:, at]
    else:
        hidden = gpt.read_on(sequences.part(1 + cache.n_filled, at.stop), cache)[:, at.start - at.stop :]
    counts = _shifted(sequences.real_BL, at)
    nll, _ = token_nll(gpt.text_logits(hidden), _shifted(sequences.ids_BL, at).clamp_max(gpt.layout.eot))
    return -(nll * counts).sum(1) / counts.sum(1).clamp_min(1)  # of nothing at all, 0


def token_nll(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target and the squared log-partition, float32 (B, L) each."""
    logits = logits_BLV.float()
    log_z = logits.logsumexp(-1)
    return log_z - logits.gather(-1, targets_BL[..., None]).squeeze(-1), log_z.square()


def _shifted(values_BL: Tensor, inputs: slice) -> Tensor:
    return values_BL[:, inputs.start + 1 : inputs.stop + 1]


def _mean(values: Tensor, counts: Tensor | None = None) -> Tensor:
    if counts is None:
        return values.mean() if values.numel() else values.new_full((), torch.nan)
    # at least 1, for of bare texts that are empty nothing counts
    return (values * counts).sum() / counts.sum().clamp_min(1) if values.numel() else values.new_full((), torch.nan)
