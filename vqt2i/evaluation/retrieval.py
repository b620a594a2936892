"""R-precision: how often a picture's own prompt is, of many, the one that a CLIP finds nearest to it.

Source: Xu et al. 2018 (AttnGAN, arXiv 1711.10485, section 4.1), there with 1 true and 99 random prompts and another
scorer. Here the others are the prompts that were drawn beside it, and those of equal facts count as true.

B pictures, P prompts, E embedding width
"""

from collections.abc import Sequence

import numpy as np
import torch

from vqt2i.clip import embed_images, embed_texts
from vqt2i.data.images import to_tensor
from vqt2i.data.shapes import Caption
from vqt2i.generation import Sample, TextToImage

PICTURES_AT_ONCE = 256


@torch.inference_mode()
def r_precision(pipeline: TextToImage, prompts: Sequence[Caption], groups: Sequence[Sequence[Sample]]) -> float:
    """The share of pictures, in [0, 1], whose nearest prompt states what their own states.

    Args:
        groups: pictures of each prompt.
    """
    text_PE = embed_texts(pipeline.clip, [pipeline.clip_text.encode(prompt.text) for prompt in prompts])
    pictures = [(p, sample.image_HW3) for p, group in enumerate(groups) for sample in group]
    right = []
    for start in range(0, len(pictures), PICTURES_AT_ONCE):
        own, images = zip(*pictures[start : start + PICTURES_AT_ONCE], strict=True)
        image_B3HW = torch.stack([to_tensor(image_HW3) for image_HW3 in images]).to(text_PE.device)
        image_BE = embed_images(pipeline.clip, image_B3HW)
        nearest = (image_BE @ text_PE.T).argmax(1).tolist()
        right += [prompts[a].facts == prompts[b].facts for a, b in zip(own, nearest, strict=True)]
    return float(np.mean(right))
