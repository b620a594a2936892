"""What a GPT reads before an image: its kinds, of one image and of a batch.

    text      ids of a tokenizer; the layout says how many
    vectors   an embedding of CLIP, of an image in training and of a text in sampling (CLIP-GEN: Wang et al. 2022, arXiv
              2203.00386)
    features  of a text, one vector for each of its ids, by an encoder such as T5 (LlamaGen: Sun et al. 2024, arXiv
              2406.06525)
    label     a class, a learned vector each (LlamaGen); without classes the GPT is unconditional, as iGPT (Chen et al.
              2020)
    low_resolution    a text, and the ids of what is drawn in half the resolution (super-resolution of CogView: Ding et
              al. 2021, arXiv 2105.13290, §3.2)

Each has a null condition for classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): the empty text, learned
vectors, one label more; the ids of low resolution stay, without their text.

B batch, N vectors, C their width, M ids of low resolution
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


class FeatureCondition(VectorCondition):
    """As many vectors as the text has ids for its encoder, its mark of the end included; the rest of it is not read.

    cleaning: of texts before they are read: "web" as they were for LlamaGen's training (`text.cleaning`).
    """

    kind: Literal["features"] = "features"
    cleaning: Literal["none", "web"] = "none"


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


class LowResolutionCondition(Config):
    """A text, which `LayoutConfig` has the sizes of, and the image at half the height and width of the grid."""

    kind: Literal["low_resolution"] = "low_resolution"


ConditionConfig = Annotated[
    TextCondition | VectorCondition | FeatureCondition | LabelCondition | LowResolutionCondition,
    Field(discriminator="kind"),
]


class Vectors(NamedTuple):
    """The vectors of one image, as a key: float32 in their order. Without values they are `n` of the learned null."""

    n: int
    values: bytes = b""


class LowResolution(NamedTuple):
    """The ids of a text, and the codes of the image in half the resolution, row by row."""

    text: tuple[int, ...]
    codes: tuple[int, ...]


# of one image, hashable and in an order: the ids of a text, vectors, a label (`n_labels` is the null), low resolution
Condition = tuple[int, ...] | Vectors | int | LowResolution


class VectorBatch(NamedTuple):
    """vectors_BNC: left-padded. real_BN: bool, false for padding. null_B: bool, rows that are the learned null."""

    vectors_BNC: Tensor
    real_BN: Tensor
    null_B: Tensor


class LowResolutionBatch(NamedTuple):
    """codes_BM: of the images in half the resolution, long."""

    text: TextBatch
    codes_BM: Tensor


# of a batch; labels are (B,) long
ConditionBatch = TextBatch | VectorBatch | Tensor | LowResolutionBatch
