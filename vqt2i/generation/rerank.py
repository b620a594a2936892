"""Which of several pictures fits its prompt best: CLIP, the GPT's own caption score, or both.

B batch (candidates)
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.clip import CLIP
from vqt2i.generation.rows import GuidedRows, Job
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, caption_log_probability
from vqt2i.gpt.loss import token_nll
from vqt2i.text import pad_texts

Scorer = Literal["clip", "caption", "both"]
EditScorer = Literal["likelihood", "clip", "caption", "both", "all"]


@torch.inference_mode()
def clip_scores(clip: CLIP, image_B3HW: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """Cosine of each image (in [-1, 1], resized where it has another size) with its text, (B,). Equal texts are read
    once."""
    rows = {t: row for row, t in enumerate(dict.fromkeys(map(tuple, texts)))}
    text = pad_texts([list(t) for t in rows], clip.config.text_length)
    device = clip.no_text.device
    image_BE = clip.encode_image(resized(image_B3HW.to(device), clip.config.image_size_px))
    text_BE = clip.encode_text(*(t.to(device) for t in text))[[rows[tuple(t)] for t in texts]]
    return (image_BE * text_BE).sum(-1).cpu()


def resized(image_B3HW: Tensor, size_px: int) -> Tensor:
    """Images in [-1, 1] as squares of this size."""
    if image_B3HW.shape[2:] == (size_px, size_px):
        return image_B3HW
    return F.interpolate(image_B3HW, (size_px, size_px), mode="bicubic", antialias=True).clamp(-1, 1)


@torch.inference_mode()
def caption_scores(gpt: GPT, image_ids_BHW: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """log p(text | image) per token in nats, (B,)."""
    text = pad_texts([list(t) for t in texts], gpt.layout.config.text_length)
    device = gpt.device
    return caption_log_probability(
        gpt, type(text)(*(t.to(device) for t in text)), image_ids_BHW.flatten(1).to(device)
    ).cpu()


@torch.inference_mode()
def likelihood_scores(gpt: GPT, image_ids_BHW: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """log p(image | text) per token in nats, (B,): of all tokens, whether they were drawn or given.

    Candidates for a hole are drawn without a look at what was given behind it; here each given token is asked for after
    the drawn ones before it.
    """
    image_BI = image_ids_BHW.flatten(1).to(gpt.device)
    jobs = [Job(tuple(text), 0, row) for row, text in enumerate(texts)]
    rows = GuidedRows(gpt, jobs, SamplingConfig(guidance=1.0))
    first = rows.logits(image_BI[:, :0])
    logits_BIV = torch.cat((first, rows.logits(image_BI[:, :-1], image_BI.shape[1] - 1)), dim=1)
    return -token_nll(logits_BIV, image_BI)[0].mean(1).cpu()


def combine(scores: dict[str, Tensor]) -> Tensor:
    """Sum of the scores of one prompt's candidates, each brought to mean 0 and deviation 1 among them."""
    return torch.stack([_standardised(score) for score in scores.values()]).sum(0)


def _standardised(score_B: Tensor) -> Tensor:
    score_B = score_B.double()
    return (score_B - score_B.mean()) / score_B.std(correction=0).clamp_min(1e-9)
