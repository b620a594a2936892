"""From prompts to what a GPT reads before an image, whatever its kind, and to what a scorer compares with.

E width of a scorer's embeddings
"""

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from vqt2i.clip import CLIP, Prior, embed_images, embed_texts, shifted_texts
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.errors import PromptError
from vqt2i.generation.prompts import Picture
from vqt2i.gpt import GPT, Condition, LabelCondition, Vectors
from vqt2i.text import TextTokenizer, clean_text
from vqt2i.text.cleaning import clean_web_caption
from vqt2i.text.encoder import TextEncoder

Prompt = str | Picture
SHOWN_NAMES = 20  # of classes, in a complaint
READS = {
    "text": "a text", "features": "features of a text", "label": "a label", "vectors": "an embedding",
    "low_resolution": "a smaller picture",
}  # fmt: skip


def reads_embeddings(gpt: GPT) -> bool:
    """Whether a GPT reads a scorer's embeddings, of texts or of pictures."""
    return gpt.config.condition.kind == "vectors"


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
    """Reads prompts for a GPT with what belongs to it; see `Parts`. size_px: of the images it draws.

    With a prior the embedding of a text is made that of an image; without one it is moved by what training measured.
    """

    text: TextTokenizer | None
    gpt: GPT
    clip: CLIP | None
    size_px: int
    clip_text: TextTokenizer | None = None
    prior: Prior | None = None
    encoder: TextEncoder | None = None

    def require_readable(self, prompt: Prompt) -> None:
        """Raises PromptError for a prompt of a kind that the GPT does not read."""
        condition = self.gpt.config.condition
        if isinstance(prompt, Picture) and not reads_embeddings(self.gpt):
            raise PromptError(f"picture {prompt.name}: this GPT reads {READS[condition.kind]}; variations need one "
                              "that reads embeddings, as configs/gpt/clip_gen_tiny.yaml trains it")  # fmt: skip
        if self.gpt.layout.is_upscaling:
            raise PromptError("this GPT draws pictures from ones of half their size, not from texts alone; use "
                              "tools/upscale.py, or --upscale of tools/generate.py")  # fmt: skip
        if isinstance(condition, LabelCondition):
            label_of(prompt, condition)

    @torch.inference_mode()
    def embed(self, prompt: Prompt) -> Tensor:
        """The scorer's embedding of a prompt, (E,)."""
        if isinstance(prompt, str):
            return embed_texts(self.clip, [self.clip_text.encode(prompt)])[0]
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
            return label_of(prompt, self.gpt.config.condition)
        asked_E = self.embed(prompt).cpu()
        if isinstance(prompt, str):
            asked_E = self._as_image(asked_E)
        return Vectors(1, asked_E.numpy().tobytes())

    @torch.inference_mode()
    def _as_image(self, text_E: Tensor) -> Tensor:
        """The embedding of a text, brought to where the GPT has read those of images."""
        if self.prior is not None:
            return self.prior(text_E)
        return shifted_texts(text_E, self.gpt.reader.text_shift.cpu())

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
        if self.encoder:
            return max(0, len(self.text.encode(self._cleaned(prompt))) + 1 - self.most_ids)
        tokenizer = self.clip_text if reads_embeddings(self.gpt) else self.text
        return max(0, len(tokenizer.encode(prompt)) - self.most_ids)
