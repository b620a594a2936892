"""What a GPT reads before an image: its kinds, of one image and of a batch.

    text      ids of a tokenizer; the layout says how many
    vectors   an embedding of CLIP, of an image in training and of a text in sampling (CLIP-GEN: Wang et al. 2022, arXiv
              2203.00386), or features of an encoder such as T5 (LlamaGen: Sun et al. 2024, arXiv 2406.06525)
    label     a class, a learned vector each (LlamaGen); without classes the GPT is unconditional, as iGPT (Chen et al.
              2020)

Each has a null condition for classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): the empty text, learned
vectors, one label more.

B batch, N vectors, C their width
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from vqt2i.config import Config
from vqt2i.text.batch import TextBatch


class TextCondition(Config):
    """A text; `LayoutConfig` has its sizes."""

    kind: Literal["text"] = "text"


class LinearProjection(Config):
    """One matrix (CLIP-GEN's)."""

    kind: Literal["linear"] = "linear"
    bias: bool = True


class MLPProjection(Config):
    """Two matrices with GELU (by tanh) between them (LlamaGen's, which has no biases). width: of what is between."""

    kind: Literal["mlp"] = "mlp"
    width: PositiveInt
    bias: bool = True


Projection = Annotated[LinearProjection | MLPProjection, Field(discriminator="kind")]


class VectorCondition(Config):
    """Up to `n_vectors` vectors of `width`, projected to the model's own; they stand directly before the image.

    encoder: fingerprint of the model that makes them.
    """

    kind: Literal["vectors"] = "vectors"
    n_vectors: PositiveInt = 1
    width: PositiveInt
    projection: Projection = LinearProjection()
    encoder: str


class LabelCondition(Config):
    """One of `n_labels` classes, or nothing at all for 0 of them. names: of all classes, or of none."""

    kind: Literal["label"] = "label"
    n_labels: NonNegativeInt = 0
    names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _every_label_has_a_name_of_its_own(self) -> "LabelCondition":
        if self.names and len(set(self.names)) != self.n_labels:
            raise ValueError(f"names: found {len(set(self.names))} different ones, expected n_labels ({self.n_labels})")
        return self


ConditionConfig = Annotated[TextCondition | VectorCondition | LabelCondition, Field(discriminator="kind")]


class Vectors(NamedTuple):
    """The vectors of one image, as a key: float32 in their order. Without values they are `n` of the learned null."""

    n: int
    values: bytes = b""


# of one image, hashable and in an order: the ids of a text, vectors, a label (`n_labels` is the null)
Condition = tuple[int, ...] | Vectors | int


class VectorBatch(NamedTuple):
    """vectors_BNC: left-padded. real_BN: bool, false for padding. null_B: bool, rows that are the learned null."""

    vectors_BNC: Tensor
    real_BN: Tensor
    null_B: Tensor


# of a batch; labels are (B,) long
ConditionBatch = TextBatch | VectorBatch | Tensor
