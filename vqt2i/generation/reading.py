"""From prompts to what a GPT reads before an image, whatever its kind, and to what a scorer compares with.

E width of a scorer's embeddings
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqt2i.clip import CLIP, embed_images, embed_texts, shifted_texts
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.errors import PromptError
from vqt2i.generation.prompts import Picture
from vqt2i.gpt import GPT, Condition, LabelCondition, Vectors
from vqt2i.text import TextTokenizer
from vqt2i.text.cleaning import clean_web_caption
from vqt2i.text.encoder import TextEncoder

Prompt = str | Picture
READS = {"text": "a text", "features": "features of a text", "label": "a label"}


def reads_embeddings(gpt: GPT) -> bool:
    """Whether a GPT reads a scorer's embeddings, of texts or of pictures."""
    return gpt.config.condition.kind == "vectors"


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Reads prompts for a GPT with what belongs to it; see `Parts`. size_px: of the images it draws."""

    text: TextTokenizer | None
    gpt: GPT
    clip: CLIP | None
    size_px: int
    encoder: TextEncoder | None = None

    def require_readable(self, prompt: Prompt) -> None:
        """Raises PromptError for a prompt of a kind that the GPT does not read."""
        condition = self.gpt.config.condition
        if isinstance(prompt, Picture) and not reads_embeddings(self.gpt):
            raise PromptError(f"picture {prompt.name}: this GPT reads {READS[condition.kind]}; variations need one "
                              "that reads embeddings, as configs/gpt/clip_gen_tiny.yaml trains it")  # fmt: skip
        if isinstance(condition, LabelCondition):
            labels = [str(label) for label in range(condition.n_labels)] or [""]
            if prompt not in labels:
                expected = f"a label from 0 to {labels[-1]}" if labels[-1] else "the empty prompt, for it reads nothing"
                raise PromptError(f"prompt {prompt!r}: expected {expected}")

    @torch.inference_mode()
    def embed(self, prompt: Prompt) -> Tensor:
        """The scorer's embedding of a prompt, (E,)."""
        if isinstance(prompt, str):
            return embed_texts(self.clip, [self.text.encode(prompt)])[0]
        # as training saw it: at the size of the images that are drawn
        pixels = to_tensor(fit_square(prompt.image_HW3, self.size_px))
        return embed_images(self.clip, pixels[None].to(next(self.clip.parameters()).device))[0]

    def condition(self, prompt: Prompt) -> Condition:
        """What the GPT reads of a prompt."""
        if self.gpt.layout.reads_text:
            return tuple(self.text.encode(prompt))
        if self.encoder:
            (features_SC,) = self.encoder.features([self.encoder.ids(self._cleaned(prompt), self.most_ids)])
            return Vectors(len(features_SC), features_SC.cpu().numpy().tobytes())
        if not reads_embeddings(self.gpt):
            return int(prompt or 0)
        asked_E = self.embed(prompt).cpu()
        if isinstance(prompt, str):
            asked_E = shifted_texts(asked_E, self.gpt.reader.text_shift.cpu())
        return Vectors(1, asked_E.numpy().tobytes())

    @property
    def most_ids(self) -> int | None:
        """How many ids of a prompt are read; None where it is no text."""
        if isinstance(self.gpt.config.condition, LabelCondition):
            return None
        if self.encoder:
            return self.gpt.config.condition.n_vectors
        return self.clip.config.text_length if reads_embeddings(self.gpt) else self.gpt.layout.config.text_length

    def _cleaned(self, text: str) -> str:
        """What the encoder reads of a text."""
        return clean_web_caption(text) if self.gpt.config.condition.cleaning == "web" else text

    def n_unread(self, prompt: Prompt) -> int:
        """How many ids at a prompt's end do not fit what reads them."""
        if isinstance(prompt, Picture) or self.most_ids is None:
            return 0
        n_ids = len(self.text.encode(self._cleaned(prompt))) + 1 if self.encoder else len(self.text.encode(prompt))
        return max(0, n_ids - self.most_ids)
