"""Which of several pictures fits its prompt best: CLIP, the GPT's own caption score, or both.

B batch (candidates)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vqt2i.clip import CLIP, embed_images, embed_texts
from vqt2i.generation.rows import GuidedRows, Job
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, Condition, caption_log_probability
from vqt2i.gpt.loss import token_nll
from vqt2i.text import pad_texts

Scorer = Literal["clip", "caption", "both"]
EditScorer = Literal["likelihood", "clip", "caption", "both", "all"]


@torch.inference_mode()
def clip_scores(clip: CLIP, image_B3HW: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """Cosine of each image (in [-1, 1]) with its text, (B,). Equal texts are read once."""
    return embedding_scores(clip, image_B3HW, embed_texts(clip, texts))


@torch.inference_mode()
def embedding_scores(clip: CLIP, image_B3HW: Tensor, asked_BE: Tensor) -> Tensor:
    """Cosine of each image (in [-1, 1]) with the embedding of what was asked for, (B,) or one for all."""
    return (embed_images(clip, image_B3HW.to(asked_BE.device)) * asked_BE).sum(-1).cpu()


@torch.inference_mode()
def caption_scores(gpt: GPT, image_ids_BHW: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """log p(text | image) per token in nats, (B,)."""
    text = pad_texts([list(t) for t in texts], gpt.layout.config.text_length)
    device = gpt.device
    return caption_log_probability(
        gpt, type(text)(*(t.to(device) for t in text)), image_ids_BHW.flatten(1).to(device)
    ).cpu()


@torch.inference_mode()
def likelihood_scores(gpt: GPT, image_ids_BHW: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """log p(image | condition) per token in nats, (B,): of all tokens, whether they were drawn or given.

    Candidates for a hole are drawn without a look at what was given behind it; here each given token is asked for after
    the drawn ones before it.
    """
    image_BI = image_ids_BHW.flatten(1).to(gpt.device)
    jobs = [Job(condition, 0, row) for row, condition in enumerate(conditions)]
    rows = GuidedRows(gpt, jobs, SamplingConfig(guidance=1.0))
    first = rows.logits(image_BI[:, :0])
    logits_BIV = torch.cat((first, rows.logits(image_BI[:, :-1], image_BI.shape[1] - 1)), dim=1)
    return -token_nll(logits_BIV, image_BI)[0].mean(1).cpu()


def combine(scores: dict[str, Tensor]) -> Tensor:
    """Sum of the scores of a prompt's candidates, (..., B), each brought to mean 0 and deviation 1 among them."""
    return torch.stack([_standardised(score) for score in scores.values()]).sum(0)


def _standardised(score_B: Tensor) -> Tensor:
    score_B = score_B.double()
    mean, deviation = score_B.mean(-1, keepdim=True), score_B.std(-1, correction=0, keepdim=True)
    return (score_B - mean) / deviation.clamp_min(1e-9)
