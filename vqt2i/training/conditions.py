"""What a GPT is trained to read before an image: its caption, features of it, its embedding by a scorer, its class, its
caption and half its resolution, or nothing.

B batch, E embedding width, H W grid
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from vqt2i.checkpoint import require_same
from vqt2i.clip import CLIP, embed_images, modality_gap, perturbed, shifted_texts
from vqt2i.config import Config
from vqt2i.data.sampling import Visits
from vqt2i.data.shards import DataSet
from vqt2i.errors import ConfigError, DataError
from vqt2i.gpt import (
    GPT,
    ConditionBatch,
    ConditionConfig,
    FeatureCondition,
    LabelCondition,
    LinearProjection,
    LowResolutionBatch,
    LowResolutionCondition,
    Projection,
    TextCondition,
    VectorBatch,
    VectorCondition,
)
from vqt2i.runtime import say
from vqt2i.text import TextBatch, TextTokenizer
from vqt2i.text.cleaning import clean_web_caption
from vqt2i.text.encoder import TextEncoder
from vqt2i.training.batches import Batch, ImageSamples


class EmbeddingCondition(Config):
    """The image's own embedding by a frozen scorer; in sampling a text's takes its place, so that training needs no
    captions (CLIP-GEN: Wang et al. 2022, arXiv 2203.00386).

    scorer: a model folder; null is the newest trained one in the runs folder, else the shipped one. width: of its
        embeddings, for one that is yet to be trained; null is whatever it has.
    noise: how far embeddings are moved in training, as a share of their length (`clip.perturbed`).
    n_shift_pairs: training pairs from which the gap between images and texts is measured before training; in sampling
        texts are moved by it (`clip.modality_gap`). 0 needs no captions, and moves nothing.
    """

    kind: Literal["embedding"] = "embedding"
    scorer: Path | None = None
    width: PositiveInt | None = None
    projection: Projection = LinearProjection()
    noise: float = Field(0.0, ge=0)
    n_shift_pairs: NonNegativeInt = 0


class NoCondition(Config):
    """Nothing: a model of images alone (iGPT, Chen et al. 2020)."""

    kind: Literal["none"] = "none"


class ClassCondition(Config):
    """The image's class (LlamaGen: Sun et al. 2024, arXiv 2406.06525).

    n_labels: how many the data set has, for one that is yet to be made; null is whatever it has.
    """

    kind: Literal["label"] = "label"
    n_labels: PositiveInt | None = None


class CaptionFeatures(Config):
    """Features of the caption by a frozen text encoder (LlamaGen, Sun et al. 2024, arXiv 2406.06525); its tokenizer is
    the `text_tokenizer` too.

    encoder: folder of a T5 of `transformers`. n_vectors, projection, cleaning: as in `FeatureCondition`.
    """

    kind: Literal["features"] = "features"
    encoder: Path
    n_vectors: PositiveInt = 120
    projection: Projection
    cleaning: Literal["none", "web"] = "none"


TrainedCondition = Annotated[
    TextCondition | EmbeddingCondition | CaptionFeatures | ClassCondition | NoCondition | LowResolutionCondition,
    Field(discriminator="kind"),
]


def model_condition(
    condition: TrainedCondition,
    scorer: CLIP | None = None,
    encoder: TextEncoder | None = None,
    labels: tuple[str, ...] = (),
) -> ConditionConfig:
    """The condition of the GPT that is trained; without a scorer or classes, of one that is planned.

    labels: names of the data set's classes.

    encoder: whose features it reads.

    Raises:
        ConfigError: the scorer's embeddings have another width than was configured, or there are more or fewer classes,
            or nothing says which.
    """
    if isinstance(condition, TextCondition | LowResolutionCondition):
        return condition
    if isinstance(condition, NoCondition):
        return LabelCondition()
    if isinstance(condition, ClassCondition):
        n_labels = len(labels) or condition.n_labels
        if n_labels is None:
            raise ConfigError("condition.n_labels: null, but no data set is read here; set it to its number of classes")
        if condition.n_labels not in (None, n_labels):
            raise ConfigError(f"condition.n_labels: {condition.n_labels}, but the data set has {n_labels} classes; "
                              "take another data set, or set it to null")  # fmt: skip
        return LabelCondition(n_labels=n_labels, names=labels)
    if isinstance(condition, CaptionFeatures):
        encoder = encoder or TextEncoder.load(condition.encoder)
        shared = condition.model_dump(include={"n_vectors", "projection", "cleaning"})
        return FeatureCondition(width=encoder.width, encoder=encoder.fingerprint, **shared)
    width = scorer.config.embedding_width if scorer else condition.width
    if width is None:
        raise ConfigError("condition.width: null, but no scorer is read here; set it to its embeddings' width")
    if condition.width not in (None, width):
        raise ConfigError(f"condition.width: {condition.width}, but the scorer's embeddings are {width} wide; "
                          "take another scorer, or set it to null")  # fmt: skip
    encoder = scorer.fingerprint if scorer else "planned"
    return VectorCondition(width=width, projection=condition.projection, encoder=encoder)


def require_labels(dataset: DataSet) -> tuple[str, ...]:
    """Names of the data set's classes; raises DataError where it has none."""
    if not dataset.labels:
        raise DataError(f"{dataset.folder}: its samples have no classes, which condition label reads; make a data set "
                        "of classes (tools/make_dataset.py ... --labels), or take another condition")  # fmt: skip
    return dataset.labels


def require_own_tokenizer(scorer: CLIP, tokenizer: TextTokenizer, path: Path) -> None:
    """Raises CheckpointError unless the tokenizer is the scorer's: it reads the prompts."""
    require_same("text tokenizer", path, found=tokenizer.fingerprint, expected=scorer.config.text_tokenizer,
                 hint="set text_tokenizer to the one that the scorer was trained with")  # fmt: skip


def load_encoder(condition: CaptionFeatures, tokenizer: TextTokenizer) -> TextEncoder:
    """The encoder of the captions; raises CheckpointError unless the tokenizer is its own."""
    encoder = TextEncoder.load(condition.encoder)
    require_same("text tokenizer", condition.encoder, found=tokenizer.fingerprint,
                 expected=encoder.tokenizer.fingerprint, hint="set text_tokenizer to the encoder's folder"
                 )  # fmt: skip
    return encoder


class Conditioner:
    """From batches to conditions, by a frozen scorer or text encoder where the GPT reads what these give."""

    def __init__(
        self, config: TrainedCondition, scorer: CLIP | None = None, encoder: TextEncoder | None = None
    ) -> None:
        self.config, self.encoder = config, encoder
        self.scorer = scorer and scorer.eval().requires_grad_(False)

    def of_images(self, batch: Batch, *, training: bool) -> ConditionBatch:
        """What the GPT reads before the batch's images; embeddings are noisy in training."""
        if isinstance(self.config, TextCondition):
            return batch.text
        if isinstance(self.config, LowResolutionCondition):
            return LowResolutionBatch(batch.text, batch.low_ids.flatten(1))
        if isinstance(self.config, NoCondition):
            return torch.zeros(len(batch.chance_B), dtype=torch.long, device=batch.chance_B.device)
        if isinstance(self.config, ClassCondition):
            return batch.label_B
        if isinstance(self.config, CaptionFeatures):
            return self._features(batch.text)
        embedding_BE = batch.embedding_BE
        if embedding_BE is None:
            with torch.no_grad():
                embedding_BE = embed_images(self.scorer.to(batch.image.device), batch.image)
        noisy = training and self.config.noise
        return as_vectors(perturbed(embedding_BE, self.config.noise) if noisy else embedding_BE)

    def _features(self, text: TextBatch) -> VectorBatch:
        """Of each caption, left-padded; of no caption the null."""
        config, encoder = self.config, self.encoder
        rows = [row[:n] for row, n in zip(text.ids_BS.tolist(), text.n_ids_B.tolist(), strict=True)]
        if config.cleaning == "web":
            rows = [encoder.tokenizer.encode(clean_web_caption(encoder.tokenizer.decode(row))) for row in rows]
        encoder.model.to(text.ids_BS.device)
        features = encoder.features([[*row[: config.n_vectors - 1], encoder.end] for row in rows])
        vectors_BNC = torch.zeros(len(rows), config.n_vectors, encoder.width, device=text.ids_BS.device)
        real_BN = torch.zeros(vectors_BNC.shape[:2], dtype=torch.bool, device=vectors_BNC.device)
        for row, features_SC in enumerate(features):
            vectors_BNC[row, -len(features_SC) :], real_BN[row, -len(features_SC) :] = features_SC, True
        return VectorBatch(vectors_BNC, real_BN, text.n_ids_B == 0)

    def of_texts(self, text: TextBatch, gpt: GPT) -> VectorBatch:
        """What the GPT reads in sampling: the embeddings of texts, moved to where those of images are."""
        with torch.no_grad():
            text_BE = self.scorer.to(text.ids_BS.device).encode_text(*text)
        return as_vectors(shifted_texts(text_BE, gpt.reader.text_shift))

    def compared(self, batch: Batch, gpt: GPT) -> dict[str, ConditionBatch]:
        """Conditions that validation compares the image's loss after, by the names of their metrics: what training
        reads, what it reads where that is dropped, and what else tells whether it is understood."""
        own = self.of_images(batch, training=False)
        nothing = gpt.reader.dropped(own, torch.ones_like(batch.chance_B, dtype=torch.bool))
        if isinstance(own, LowResolutionBatch):
            others = own._replace(codes_BM=own.codes_BM.roll(1, dims=0))
            return {"val/image": own, "val/image_without_text": nothing, "val/image_from_another": others}
        conditions = {"val/image": own, "val/image_unconditional": nothing}
        if batch.text is not None and self.scorer:
            conditions["val/image_from_text"] = self.of_texts(batch.text, gpt)
        return conditions


CAPTIONS = Conditioner(TextCondition())


def windowed(batch: Batch, height: int, width: int, ids_per_cell: int) -> Batch:
    """The batch with a window of `height` x `width` codes of each image, and of the same place in half the resolution.

    Windows begin at cells of low resolution, all of these alike likely.

    Args:
        batch: with `image_ids`, `low_ids` and `place_B2`.
    """
    low_BHW = batch.low_ids
    n_rows = low_BHW.shape[1] - height // 2 + 1
    n_columns = (low_BHW.shape[2] - width // 2) // ids_per_cell + 1
    # the product of a number just below 1 may be rounded up
    top_B, cell_B = (
        (u_B * n).long().clamp_max(n - 1) for u_B, n in zip(batch.place_B2.T, (n_rows, n_columns), strict=True)
    )
    left_B = cell_B * ids_per_cell
    low_BHW = _cut(low_BHW, top_B, left_B, height // 2, width // 2)
    return batch._replace(image_ids=_cut(batch.image_ids, 2 * top_B, 2 * left_B, height, width), low_ids=low_BHW)


def _cut(ids_BHW: Tensor, top_B: Tensor, left_B: Tensor, height: int, width: int) -> Tensor:
    rows_BH1 = (top_B[:, None] + torch.arange(height, device=top_B.device))[..., None]
    columns_B1W = (left_B[:, None] + torch.arange(width, device=left_B.device))[:, None]
    return ids_BHW[torch.arange(len(ids_BHW), device=top_B.device)[:, None, None], rows_BH1, columns_B1W]


def as_vectors(embedding_BE: Tensor) -> VectorBatch:
    """One vector for each row."""
    row_B = torch.zeros(len(embedding_BE), dtype=torch.bool, device=embedding_BE.device)
    return VectorBatch(embedding_BE[:, None], ~row_B[:, None], row_B)


@torch.no_grad()
def measure_shift(scorer: CLIP, samples: ImageSamples, n_pairs: int, at_once: int = 256) -> Tensor:
    """What moves texts to where images are, (E,), from the first pairs of a split; tells the gap.

    Raises:
        ConfigError: fewer than two of them have a caption.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, min(n_pairs, len(samples)), at_once):
        index_B = np.arange(start, min(start + at_once, n_pairs, len(samples)))
        batch = samples.batch(Visits(index_B, np.zeros_like(index_B)), scorer.config.text_length, augment=False)
        captioned_B = batch.text.n_ids_B > 0
        image_BE = embed_images(scorer, batch.image[captioned_B])
        parts.append((image_BE, scorer.encode_text(*(t[captioned_B] for t in batch.text))))
    image_BE, text_BE = (torch.cat(part) for part in zip(*parts, strict=True))
    if len(image_BE) < 2:
        raise ConfigError(f"condition.n_shift_pairs {n_pairs}: {len(image_BE)} of these training pairs have a caption; "
                          "set it to 0, or train on pairs with captions")  # fmt: skip
    gap = modality_gap(image_BE, text_BE)
    say(f"{len(image_BE):,} pairs: the means of images and texts are {gap.distance:.3f} apart; the cosine of an image "
        f"with its text is {gap.cosine:.3f}, once texts are moved {gap.shifted_cosine:.3f}, with other texts "
        f"{gap.cosine_of_others:.3f}")  # fmt: skip
    return gap.shift_E
