"""From prompts to what a GPT reads before an image, whatever its kind, and to what a scorer compares with.

E width of a scorer's embeddings
"""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from vqt2i.clip import CLIP, embed_images, embed_texts, shifted_texts
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.errors import PromptError
from vqt2i.generation.prompts import Picture
from vqt2i.gpt import GPT, Condition, LabelCondition, VectorCondition, Vectors
from vqt2i.text import TextTokenizer, clean_text

Prompt = str | Picture
SHOWN_NAMES = 20  # of classes, in a complaint


def reads_embeddings(gpt: GPT) -> bool:
    """Whether a GPT reads a scorer's embeddings, of texts or of pictures."""
    return isinstance(gpt.config.condition, VectorCondition)


def label_of(prompt: str, condition: LabelCondition) -> int:
    """The label that a prompt asks for: by the name of its class, or by its number where classes have no names.

    The empty prompt asks for none, which is the null.

    Raises:
        PromptError: no such class.
    """
    names = [clean_text(name) for name in condition.names] or [str(label) for label in range(condition.n_labels)]
    if prompt in names:
        return names.index(prompt)
    if not prompt:
        return condition.n_labels
    if not names:
        raise PromptError(f"prompt {prompt!r}: expected the empty prompt, for this GPT reads nothing")
    near = difflib.get_close_matches(prompt, names, n=SHOWN_NAMES, cutoff=0.5) if names[SHOWN_NAMES:] else names
    told = f", such as {', '.join(near or names[:SHOWN_NAMES])}" if names[SHOWN_NAMES:] else f": {', '.join(names)}"
    raise PromptError(f"prompt {prompt!r}: no class of this GPT; it reads one of {len(names):,}{told}")


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
            label_of(prompt, condition)

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
        if not reads_embeddings(self.gpt):
            return label_of(prompt, self.gpt.config.condition)
        asked_E = self.embed(prompt).cpu()
        if isinstance(prompt, str):
            asked_E = shifted_texts(asked_E, self.gpt.reader.text_shift.cpu())
        return Vectors(1, asked_E.numpy().tobytes())

    @property
    def most_ids(self) -> int | None:
        """How many ids of a prompt are read; None where it is no text."""
        if isinstance(self.gpt.config.condition, LabelCondition):
            return None
        return self.clip.config.text_length if reads_embeddings(self.gpt) else self.gpt.layout.config.text_length

    def n_unread(self, prompt: Prompt) -> int:
        """How many ids at a prompt's end do not fit what reads them."""
        if isinstance(prompt, Picture) or self.most_ids is None:
            return 0
        return max(0, len(self.text.encode(prompt)) - self.most_ids)
