"""Who says how well pictures fit prompts: a pipeline's scorer and its GPT's caption score.

By default that is the pipeline that is measured. Pictures of different models can be compared by one judge only.

B pictures, E embedding width
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vqt2i.checkpoint import CARD, read_card
from vqt2i.clip import CLIP, embed_images, embed_texts
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.generation import TextToImage
from vqt2i.generation.find import open_pipeline
from vqt2i.generation.parts import load_scorer
from vqt2i.generation.rerank import caption_scores
from vqt2i.gpt import GPT
from vqt2i.text import TextTokenizer
from vqt2i.vq import AnyImageTokenizer


@dataclass(frozen=True, eq=False)
class Judge:
    """The parts that judge. clip may be None; gpt and vq are both there or neither. clip_text: what `clip` reads; text:
    what `gpt` does."""

    text: TextTokenizer | None
    clip: CLIP | None
    clip_text: TextTokenizer | None
    gpt: GPT | None = None
    vq: AnyImageTokenizer | None = None

    @classmethod
    def of(cls, pipeline: TextToImage) -> "Judge":
        reads = pipeline.reads_images
        return cls(pipeline.text, pipeline.clip, pipeline.clip_text, *((pipeline.gpt, pipeline.vq) if reads else ()))

    @property
    def fingerprints(self) -> dict[str, str]:
        parts = {"text": self.text, "clip": self.clip, "gpt": self.gpt, "vq": self.vq}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (B, E) on the CPU."""
        return embed_texts(self.clip, [self.clip_text.encode(text) for text in texts]).cpu()

    @torch.inference_mode()
    def embed_images(self, image_BHW3: np.ndarray) -> Tensor:
        """Unit vectors (B, E) of uint8 pictures, on the CPU."""
        return embed_images(self.clip, to_tensor(image_BHW3).to(_device(self.clip))).cpu()

    @torch.inference_mode()
    def caption_scores(self, image_BHW3: np.ndarray, text: str) -> Tensor:
        """log p(text | picture) per token in nats, (B,): of the pictures' own ids, as `vq` reads them."""
        size_px = self.vq.config.image_size_px
        image_B3HW = to_tensor(np.stack([fit_square(image_HW3, size_px) for image_HW3 in image_BHW3]))
        ids_BHW = self.vq.encode(image_B3HW.to(self.vq.device))
        return caption_scores(self.gpt, ids_BHW, [self.text.encode(text)] * len(ids_BHW))


def open_judge(model: str, runs: Path, device: str) -> Judge:
    """A pipeline as `find.open_pipeline` finds it, or the folder of a scorer with a tokenizer of its own.

    Raises:
        CheckpointError: nothing of this name, or a damaged one.
    """
    folder = Path(model)
    if (folder / CARD).is_file() and read_card(folder).get("kind") == "clip":
        clip, text = load_scorer(folder, None, "judge by a pipeline that has it")
        return Judge(None, clip.to(device), text)
    return Judge.of(open_pipeline(model, runs, device))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
