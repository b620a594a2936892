"""Where text ends and image begins: the only file that knows.

One id space:  [text ids | EOT | image ids | PAD T2I I2T BOI BOT | P₁ … P_S]. The text head scores text ids and EOT, the
image head image ids; the specials after them are inputs only.

Two orders of equal length S + 3 + I, for texts of at most S ids and images of I ids:

    text → image    PAD … PAD T2I t₁ … tₙ EOT | BOI i₁ … i_I        left-padded: one index for image token k
    image → text    I2T i₁ … i_I BOT | t₁ … tₙ EOT PAD … PAD

PAD is seen by nothing. With learned padding there are ids of its own for it, which are seen, one for each place that a
text may leave free (DALL·E, Ramesh et al. 2021, arXiv 2102.12092, §2.2):

    text → image    T2I t₁ … tₙ EOT Pₙ₊₁ … P_S | BOI i₁ … i_I

Bare texts have such padding and no marks, so that there is no order image → text and no EOT in the id space (minDALL-E
and ruDALL-E in their published code):

    text → image    t₁ … tₙ Pₙ₊₁ … P_S i₁ … i_I

Positions have three axes (text, row, column): a text token is (k, 0, 0) counted from its own start, so that padding
changes nothing; an image token is (0, row + 1, column + 1); marks are (0, 0, 0), EOT follows its text.
A text of no ids is the null condition of classifier-free guidance (Ho & Salimans 2022). Read as other texts are, it has
to be trained beside them; where the null condition is "image_first", its image is read as in the order image → text,
which is trained already, and the rows that guided an image can go on to the score of its text:

    null → image    PAD … PAD I2T i₁ … i_I

Where vectors or a label stand for a text there are image ids only, and behind them one of each label and of the null:

    vectors → image    PAD … PAD v₁ … vₙ i₁ … i_I        label → image    C i₁ … i_I

The last of them predicts i₁, as the mark BOI does. Vectors stand at (k, 0, 0) from 0, a label at (0, 0, 0), bare texts
with their padding at (k, 0, 0) from 1.

Where the image is to be drawn from one of half the height and width, the ids of that stand behind the text, in the same
id space, each where the upper left of the four that it stands for does, on a plane of its own behind all of the text:

    PAD … PAD T2I t₁ … tₙ EOT l₁ … l_M | BOI i₁ … i_I        l at (S + 2, 2 · row + 1, 2 · column + 1), rows from 0

With paired marks there are two on each side of an image, as in the published code of CogView (Ding et al. 2021, arXiv
2105.13290): EOT, which tells an image's size there, stands before BOI wherever it is, and I2T behind the image. Nothing
ends a text that follows an image. A second image has marks of its own, B₁ B₂ B₃, and is counted from the first of
them on again where positions are those of the sequence:

    text → image    PAD … PAD T2I t₁ … tₙ EOT | BOI i₁ … i_I I2T
    image → text    EOT BOI i₁ … i_I I2T BOT | t₁ … tₙ PAD … PAD
    half → whole    PAD … PAD T2I t₁ … tₙ EOT BOI l₁ … l_M I2T B₁ B₂ EOT B₃ | i₁ … i_I

B batch, S longest text, N vectors, M ids of low resolution, I image ids, L sequence, A axes, D the model's width
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from vqt2i.config import Config
from vqt2i.gpt.condition import (
    ConditionConfig,
    LabelCondition,
    LowResolutionCondition,
    TextCondition,
    VectorCondition,
)
from vqt2i.text.batch import TextBatch


class Sequences(NamedTuple):
    """ids_BL long; positions_BLA long, A = 3; real_BL bool, false for padding.

    vectors_BND: what stands in place of the embeddings of the first N ids, which say nothing then.
    """

    ids_BL: Tensor
    positions_BLA: Tensor
    real_BL: Tensor
    vectors_BND: Tensor | None = None

    def cat(self, other: "Sequences") -> "Sequences":
        """The rows of both; they are of ids alone."""
        return Sequences(*(torch.cat(pair) for pair in zip(self[:3], other[:3], strict=True)))

    def then(self, other: "Sequences") -> "Sequences":
        """Each row followed by the other's, which is of ids alone."""
        joined = (torch.cat(pair, dim=1) for pair in zip(self[:3], other[:3], strict=True))
        return Sequences(*joined, self.vectors_BND)

    def until(self, end: int) -> "Sequences":
        """The positions before `end`, which is behind all vectors."""
        return Sequences(*(t[:, :end] for t in self[:3]), self.vectors_BND)

    def part(self, start: int, end: int) -> "Sequences":
        """The positions from `start` to before `end`, all behind vectors."""
        return Sequences(*(t[:, start:end] for t in self[:3]))

    def causal_mask(self) -> Tensor:
        """Bool (B, 1, L, L): a query sees itself and the real positions before it.

        Padding sees itself too, so that no row of the softmax is empty (it would be NaN).
        """
        length = self.ids_BL.shape[1]
        below = torch.ones(length, length, dtype=torch.bool, device=self.ids_BL.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=self.ids_BL.device)
        return ((below & self.real_BL[:, None, :]) | itself).unsqueeze(1)


class LayoutConfig(Config):
    """Sizes of a sequence; they follow from the tokenizers and the longest text.

    n_text_ids, text_length: 0 where no text is read. padding: of texts before an image, "masked" or "learned"; with
    "bare" it is learned and there are no marks.
    null_condition: how a text of no ids is read. image_marks: how many stand on each side of an image.
    text_attention: what the ids of a text before an image see of it: "causal", those before them, or "full", all of it,
        as in a prefix LM (Raffel et al. 2020, arXiv 1910.10683, section 3.2.1). Such a text is not predicted; the one
        behind an image is causal always.
    """

    n_text_ids: NonNegativeInt = 0
    n_image_ids: PositiveInt
    text_length: NonNegativeInt = 0
    grid_height: PositiveInt
    grid_width: PositiveInt
    padding: Literal["masked", "learned", "bare"] = "masked"
    null_condition: Literal["empty_text", "image_first"] = "empty_text"
    image_marks: Literal["single", "paired"] = "single"
    text_attention: Literal["causal", "full"] = "causal"

    @model_validator(mode="after")
    def _texts_seen_in_full_have_marks(self) -> Self:
        if self.text_attention == "full" and (self.padding == "bare" or not self.text_length):
            raise ValueError(f"text_attention full: found {self.padding} padding of {self.text_length} text ids; "
                             "expected texts with marks, which tell those before an image")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _an_image_that_comes_first_has_no_padding(self) -> Self:
        if self.null_condition == "image_first" and (self.padding != "masked" or not self.text_length):
            raise ValueError(f"null_condition image_first: found {self.padding} padding of {self.text_length} text "
                             "ids; expected texts whose padding is masked")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _paired_marks_stand_beside_those_of_texts(self) -> Self:
        if self.image_marks == "paired" and (
            self.padding == "bare" or not self.text_length or self.null_condition == "image_first"
        ):
            raise ValueError(f"image_marks paired: found {self.padding} padding of {self.text_length} text ids, "
                             f"null_condition {self.null_condition}; expected texts with marks, and empty_text"
                             )  # fmt: skip
        return self


@dataclass(frozen=True)
class SequenceLayout:
    """Joins a condition and image ids into sequences and says which positions predict what."""

    config: LayoutConfig
    condition: ConditionConfig = field(default_factory=TextCondition)

    @property
    def reads_text(self) -> bool:
        """Whether there are text ids."""
        return self.predicts_text or self.is_upscaling

    @property
    def predicts_text(self) -> bool:
        """Whether texts are predicted too."""
        return isinstance(self.condition, TextCondition)

    @property
    def predicts_prompts(self) -> bool:
        """Whether texts before an image are predicted too, as they can be where no id sees those after it."""
        return self.predicts_text and self.config.text_attention == "causal"

    @property
    def is_upscaling(self) -> bool:
        """Whether images are drawn from ones of half the resolution."""
        return isinstance(self.condition, LowResolutionCondition)

    @property
    def has_marks(self) -> bool:
        """Whether marks stand around a text, as they must where it is predicted from an image."""
        return self.reads_text and self.config.padding != "bare"

    @property
    def has_both_orders(self) -> bool:
        """Whether texts are read after an image too, and predicted from it."""
        return self.predicts_text and self.has_marks

    @property
    def has_pairs(self) -> bool:
        """Whether two marks stand on each side of an image, and none behind a text that follows it."""
        return self.config.image_marks == "paired"

    @property
    def counts_anew(self) -> bool:
        """Whether positions of the sequence begin anew at a second image."""
        return self.has_pairs and self.is_upscaling

    @property
    def eot(self) -> int:
        return self.config.n_text_ids

    @property
    def first_image_id(self) -> int:
        return self.config.n_text_ids + self.has_marks

    @property
    def pad(self) -> int:
        return self.first_image_id + self.config.n_image_ids

    @property
    def t2i(self) -> int:
        return self.pad + 1

    @property
    def i2t(self) -> int:
        return self.pad + 2

    @property
    def boi(self) -> int:
        return self.pad + 3

    @property
    def bot(self) -> int:
        return self.pad + 4

    @property
    def second_marks(self) -> tuple[int, ...]:
        """B₁, B₂ and B₃ before a second image, the last of all ids."""
        return tuple(range(self.n_ids - 3, self.n_ids)) if self.counts_anew else ()

    @property
    def first_learned_pad(self) -> int:
        return self.pad + 5 if self.has_marks else self.pad

    @property
    def first_label_id(self) -> int:
        return self.first_image_id + self.config.n_image_ids

    @property
    def n_ids(self) -> int:
        if isinstance(self.condition, LabelCondition):
            return self.first_label_id + self.condition.n_labels + 1
        if isinstance(self.condition, VectorCondition):
            return self.n_targets
        n_pads = self.config.text_length if self.config.padding != "masked" else 0
        return self.first_learned_pad + n_pads + 3 * self.counts_anew

    @property
    def n_targets(self) -> int:
        """Ids below this one can be predicted; the rest are inputs only."""
        return self.first_image_id + self.config.n_image_ids

    @property
    def image_length(self) -> int:
        return self.config.grid_height * self.config.grid_width

    @property
    def prefix_length(self) -> int:
        """Length of everything before the first image token in the order text → image."""
        if isinstance(self.condition, VectorCondition):
            return self.condition.n_vectors
        if not self.reads_text:
            return 1
        return self.config.text_length + (3 if self.has_marks else 0) + self.low_length + 5 * self.counts_anew

    @property
    def low_length(self) -> int:
        """How many ids of low resolution stand before the image."""
        return (self.config.grid_height // 2) * (self.config.grid_width // 2) if self.is_upscaling else 0

    @property
    def n_text_positions(self) -> int:
        """Length of the text axis: positions on it are below."""
        if not self.reads_text:
            return self.prefix_length
        return self.config.text_length + (2 if self.has_marks else 1) + self.is_upscaling

    @property
    def length(self) -> int:
        return self.prefix_length + self.image_length + (self.has_pairs and self.has_both_orders)

    @property
    def n_sequence_positions(self) -> int:
        """How many `index_in_sequence` counts at most."""
        if self.counts_anew:  # up to B₁, or from it on
            return max(self.prefix_length - 3, 4 + self.image_length)
        return self.length

    def mask(self, sequences: Sequences) -> Tensor:
        """Bool (B, 1, L, L), what each position sees: `causal_mask`, and in full attention all of its own text where an
        image follows, T2I and EOT with it."""
        causal_B1LL = sequences.causal_mask()
        if self.config.text_attention == "causal":
            return causal_B1LL
        ids = sequences.ids_BL
        text_BL = (ids == self.t2i).any(1, keepdim=True) & ((ids <= self.eot) | (ids == self.t2i))
        return causal_B1LL | (text_BL[:, :, None] & text_BL[:, None, :]).unsqueeze(1)

    def text_prefix(self, text: TextBatch) -> Sequences:
        """PAD … T2I text EOT BOI, or a bare text: what stands before the image in the order text → image.

        Its length is S + 3: `prefix_length` for texts padded to `text_length`; decoding pads them less, unless padding
        is learned.
        """
        learned = self.config.padding != "masked"
        if learned:
            text = text._replace(ids_BS=F.pad(text.ids_BS, (0, self.config.text_length - text.ids_BS.shape[1])))
        if not self.has_marks:
            return self._bare_prefix(text)
        S, n_B1 = text.ids_BS.shape[1], text.n_ids_B[:, None]
        slot_1L = torch.arange(S + 2, device=text.ids_BS.device)[None]
        # 0 at T2I, 1..n in the text, n + 1 at EOT, negative in masked padding, above in learned padding
        order_BL = slot_1L.expand(len(n_B1), -1) if learned else slot_1L - (S - n_B1)
        inner = torch.gather(text.ids_BS, 1, (order_BL - 1).clamp(0, S - 1))
        ids = torch.where(order_BL <= 0, self.t2i, torch.where(order_BL == n_B1 + 1, self.eot, inner))
        ids = torch.where(order_BL < 0, self.pad, ids)
        ids = torch.where(order_BL > n_B1 + 1, self.first_learned_pad + order_BL - 2, ids)
        positions = torch.zeros(*ids.shape[:1], S + 3, 3, dtype=torch.long, device=ids.device)
        positions[:, : S + 2, 0] = order_BL.clamp_min(0)
        ids = torch.cat((ids, torch.full_like(ids[:, :1], self.boi)), dim=1)
        real = F.pad(order_BL >= 0, (0, 1), value=True)
        if self.config.null_condition == "image_first":
            last_1L = torch.arange(S + 3, device=ids.device)[None] == S + 2
            null_B1 = n_B1 == 0
            ids = torch.where(null_B1, torch.where(last_1L, self.i2t, self.pad), ids)
            positions = positions.masked_fill(null_B1[..., None], 0)
            real = torch.where(null_B1, last_1L, real)
        return Sequences(ids, positions, real)

    def _bare_prefix(self, text: TextBatch) -> Sequences:
        slot_1S = torch.arange(self.config.text_length, device=text.ids_BS.device)[None]
        ids = torch.where(slot_1S < text.n_ids_B[:, None], text.ids_BS, self.first_learned_pad + slot_1S)
        positions = F.pad((slot_1S + 1).expand_as(ids)[..., None], (0, 2))
        return Sequences(ids, positions, torch.ones_like(ids, dtype=torch.bool))

    def vector_prefix(self, vectors_BND: Tensor, real_BN: Tensor) -> Sequences:
        """PAD … vectors: what stands before the image where vectors do. `real_BN`: bool, false for padding."""
        positions = torch.zeros(*real_BN.shape, 3, dtype=torch.long, device=real_BN.device)
        positions[..., 0] = (real_BN.long().cumsum(1) - 1).clamp_min(0)
        return Sequences(torch.zeros_like(positions[..., 0]), positions, real_BN, vectors_BND)

    def low_resolution_prefix(self, text: TextBatch, low_BM: Tensor) -> Sequences:
        """PAD … T2I text EOT, codes of low resolution, BOI: what stands before the image that is drawn from these. With
        paired marks BOI stands before the codes, and behind them I2T and the marks of a second image."""
        before = self.text_prefix(text)
        index, width = torch.arange(low_BM.shape[1], device=low_BM.device), self.config.grid_width // 2
        plane = torch.full_like(index, self.n_text_positions - 1)
        coordinates = torch.stack((plane, 2 * (index // width) + 1, 2 * (index % width) + 1), dim=-1)
        real = torch.ones_like(low_BM, dtype=torch.bool)
        low = Sequences(low_BM + self.first_image_id, coordinates.expand(*low_BM.shape, 3), real)
        if not self.has_pairs:
            return before.until(-1).then(low).then(self._marks(low_BM, self.boi))
        first, second, last = self.second_marks
        return before.then(low).then(self._marks(low_BM, self.i2t, first, second, self.eot, last))

    def _marks(self, like_BL: Tensor, *ids: int) -> Sequences:
        """These marks in every row."""
        ids_BL = torch.cat([torch.full_like(like_BL[:, :1], id) for id in ids], dim=1)
        positions = torch.zeros(*ids_BL.shape, 3, dtype=torch.long, device=like_BL.device)
        return Sequences(ids_BL, positions, torch.ones_like(ids_BL, dtype=torch.bool))

    def label_prefix(self, label_B: Tensor) -> Sequences:
        """The id of each label, (B, 1); `n_labels` is the null."""
        ids_B1 = label_B[:, None] + self.first_label_id
        positions = torch.zeros(*ids_B1.shape, 3, dtype=torch.long, device=ids_B1.device)
        return Sequences(ids_B1, positions, torch.ones_like(ids_B1, dtype=torch.bool))

    def image_part(self, image_BI: Tensor, first: int | Tensor = 0) -> Sequences:
        """Image codes (from 0), number `first` (a tensor: (1,)) and those after it, as ids with their positions."""
        n = image_BI.shape[1]
        index = first + torch.arange(n, device=image_BI.device)
        width = self.config.grid_width
        coordinates = torch.stack((torch.zeros_like(index), index // width + 1, index % width + 1), dim=-1)
        positions = coordinates.expand(image_BI.shape[0], n, 3)
        return Sequences(image_BI + self.first_image_id, positions, torch.ones_like(image_BI, dtype=torch.bool))

    def place_index(self, sequences: Sequences) -> Tensor:
        """Number of each token's place in the image, in raster order, (B, L), from 0; -1 for what has none."""
        row, column = sequences.positions_BLA[..., 1:].unbind(-1)
        return torch.where(column > 0, (row - 1) * self.config.grid_width + column - 1, -1)

    def image_index(self, sequences: Sequences) -> Tensor:
        """`place_index` of tokens of the image itself; -1 for those of low resolution too."""
        return torch.where(sequences.positions_BLA[..., 0] == 0, self.place_index(sequences), -1)

    def index_in_sequence(self, sequences: Sequences, n_before_B: Tensor | None = None) -> Tensor:
        """Number of each token in the whole, padding not counted, (B, L), from 0.

        Args:
            n_before_B: real positions before the first of these; None is none.
        """
        index_BL = (sequences.real_BL.cumsum(1) - 1).clamp_min(0)
        if n_before_B is not None:
            index_BL = index_BL + n_before_B[:, None]
        if not self.counts_anew:
            return index_BL
        starts_BL = sequences.ids_BL == self.second_marks[0]
        behind_BL = starts_BL.cumsum(1) - starts_BL.long()
        index_BL = index_BL - behind_BL * (index_BL * starts_BL).sum(1, keepdim=True)
        image_BL = self.image_index(sequences)
        return torch.where(image_BL < 0, index_BL, image_BL + 4)  # behind the four marks

    def join(self, text: TextBatch, image_BI: Tensor) -> Sequences:
        """text → image, length `length`."""
        whole = self.text_prefix(text).then(self.image_part(image_BI))
        return whole.then(self._marks(image_BI, self.i2t)) if self.has_pairs else whole

    def image_prefix(self, image_BI: Tensor) -> Sequences:
        """I2T image BOT, or with paired marks EOT BOI image I2T BOT: what stands before the text in the order
        image → text."""
        before = (self.eot, self.boi) if self.has_pairs else (self.i2t,)
        behind = (self.i2t, self.bot) if self.has_pairs else (self.bot,)
        image = self._marks(image_BI, *before).then(self.image_part(image_BI))
        return image.then(self._marks(image_BI, *behind))

    def text_part(self, text_BL: Tensor, first: int = 0) -> Sequences:
        """Text ids or EOT, number `first` behind an image and those after it, with their positions."""
        positions = torch.zeros(*text_BL.shape, 3, dtype=torch.long, device=text_BL.device)
        positions[..., 0] = torch.arange(first + 1, first + 1 + text_BL.shape[1], device=text_BL.device)
        return Sequences(text_BL, positions, torch.ones_like(text_BL, dtype=torch.bool))

    def join_reversed(self, text: TextBatch, image_BI: Tensor) -> Sequences:
        """image → text, length `length`."""
        n_B1 = text.n_ids_B[:, None]
        n_last_B1 = n_B1 - int(self.has_pairs)  # of EOT, or of the last id
        length = self.config.text_length + (not self.has_pairs)
        order_BL = torch.arange(length, device=image_BI.device)[None].expand(len(image_BI), -1)
        inner = F.pad(text.ids_BS, (0, length - text.ids_BS.shape[1]))
        ids = torch.where(order_BL < n_B1, inner, torch.where(order_BL <= n_last_B1, self.eot, self.pad))
        after = self.text_part(ids)._replace(real_BL=order_BL <= n_last_B1)
        return self.image_prefix(image_BI).then(after)

    def text_targets(self, *, reversed_order: bool) -> slice:
        """Inputs at these indices predict the text and its EOT (S + 1 of them, padding included); of a bare text all
        but its first id (S - 1 of them), of one that nothing ends all its ids."""
        if not self.has_marks:
            return slice(0, self.config.text_length - 1)
        start = self.image_length + (3 if self.has_pairs else 1) if reversed_order else 0
        return slice(start, start + self.config.text_length + (not (self.has_pairs and reversed_order)))

    def image_targets(self, *, reversed_order: bool) -> slice:
        """Inputs at these indices predict the image ids (I of them)."""
        start = (1 if self.has_pairs else 0) if reversed_order else self.prefix_length - 1
        return slice(start, start + self.image_length)
