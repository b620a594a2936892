"""From prompts to what a GPT reads before an image, whatever its kind, and to what a scorer compares with.

B batch (prompts), E width of a scorer's embeddings
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqt2i.clip import CLIP, embed_images, embed_texts, shifted_texts
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.errors import PromptError
from vqt2i.generation.prompts import Picture
from vqt2i.gpt import GPT, Condition, LabelCondition, VectorCondition, Vectors
from vqt2i.text import TextTokenizer

Prompt = str | Picture


def reads_embeddings(gpt: GPT) -> bool:
    """Whether a GPT reads a scorer's embeddings, of texts or of pictures."""
    return isinstance(gpt.config.condition, VectorCondition)


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Reads prompts for a GPT with the tokenizer and scorer that belong to it. size_px: of the images it draws."""

    text: TextTokenizer
    gpt: GPT
    clip: CLIP | None
    size_px: int

    def require_readable(self, prompt: Prompt) -> None:
        """Raises PromptError for a prompt of a kind that the GPT does not read."""
        condition = self.gpt.config.condition
        if isinstance(prompt, Picture) and not reads_embeddings(self.gpt):
            raise PromptError(f"picture {prompt.name}: this GPT reads a {condition.kind}; variations need one that "
                              "reads embeddings, as configs/gpt/clip_gen_tiny.yaml trains it")  # fmt: skip
        if isinstance(condition, LabelCondition):
            labels = [str(label) for label in range(condition.n_labels)] or [""]
            if prompt not in labels:
                expected = f"a label from 0 to {labels[-1]}" if labels[-1] else "the empty prompt, for it reads nothing"
                raise PromptError(f"prompt {prompt!r}: expected {expected}")

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Prompt]) -> Tensor:
        """The scorer's embedding of each prompt, (B, E)."""
        texts = [self.text.encode(prompt) for prompt in prompts if isinstance(prompt, str)]
        text_BE = iter(embed_texts(self.clip, texts) if texts else ())
        return torch.stack([next(text_BE) if isinstance(p, str) else self._embed_picture(p) for p in prompts])

    def _embed_picture(self, picture: Picture) -> Tensor:
        # as training saw it: at the size of the images that are drawn
        pixels = to_tensor(fit_square(picture.image_HW3, self.size_px))
        return embed_images(self.clip, pixels[None].to(self.gpt.device))[0]

    def conditions(self, prompts: Sequence[Prompt], asked_BE: Tensor | None) -> list[Condition]:
        """What the GPT reads of each prompt; `asked_BE` is `embed` of them, for a GPT that reads embeddings."""
        if self.gpt.layout.reads_text:
            return [tuple(self.text.encode(prompt)) for prompt in prompts]
        if not reads_embeddings(self.gpt):
            return [int(prompt or 0) for prompt in prompts]
        moved_BE = shifted_texts(asked_BE, self.gpt.reader.text_shift)
        rows = zip(prompts, asked_BE.cpu(), moved_BE.cpu(), strict=True)
        read = [moved if isinstance(prompt, str) else asked for prompt, asked, moved in rows]
        return [Vectors(1, vector_E.numpy().tobytes()) for vector_E in read]

    def n_unread(self, prompt: Prompt) -> int:
        """How many ids at a prompt's end do not fit what reads them."""
        if isinstance(prompt, Picture) or isinstance(self.gpt.config.condition, LabelCondition):
            return 0
        limit = self.clip.config.text_length if reads_embeddings(self.gpt) else self.gpt.layout.config.text_length
        return max(0, len(self.text.encode(prompt)) - limit)
