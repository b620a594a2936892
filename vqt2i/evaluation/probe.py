"""A linear probe: how well a GPT's features of an image tell its class, layer by layer.

Source: Chen et al. 2020 (iGPT), section 2.4: an image's features in layer l are the normed inputs of that block,
averaged over the image's positions; l = L is what the last norm gives. All that is trained is a logistic regression
from features to classes, by L-BFGS (section 3.4). The image is read behind the null condition, whatever the GPT reads,
so that no caption or class gives its own away.

What a number means is told by others, of the same images by the same regression: features of the same GPT with random
weights, the image's pixels, and how often each id occurs in it.

N images, D width of features, L layers, C classes, K ids, B batch
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from vqt2i.config import Config
from vqt2i.data.images import fit_square, to_tensor
from vqt2i.data.shards import DataSet
from vqt2i.errors import ConfigError, DataError
from vqt2i.generation import TextToImage
from vqt2i.gpt import GPT, VectorCondition, Vectors

_AT_ONCE = 32


class ProbeConfig(Config):
    """n_train, n_validation: images of the splits (fewer where these have fewer). penalty: of the squared weights.

    steps: of L-BFGS, which ends before where it has converged.
    """

    train_split: str = "train"
    validation_split: str = "val"
    n_train: int = Field(4000, ge=2)
    n_validation: PositiveInt = 1000
    penalty: NonNegativeFloat = 1e-3
    steps: PositiveInt = 200
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class ProbeResult:
    """Shares of validation images whose class is found. layers, random: of L + 1 layers, of the GPT and of one with
    random weights. guess: of always naming the class that is most frequent in the training split."""

    layers: tuple[float, ...]
    random: tuple[float, ...]
    pixels: float
    id_counts: float
    guess: float
    n_classes: int
    n_train: int
    n_validation: int

    @property
    def best(self) -> int:
        """The layer whose features find most, by these very images, as iGPT chooses it (the first of several)."""
        return int(np.argmax(self.layers))

    @property
    def standard_error(self) -> float:
        """Of the best layer's share."""
        share = self.layers[self.best]
        return (share * (1 - share) / self.n_validation) ** 0.5

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"best": self.best, "standard_error": self.standard_error}


def probe(
    pipeline: TextToImage, dataset: DataSet, config: ProbeConfig, on_stage: Callable[[str], None] = lambda _: None
) -> ProbeResult:
    """Probe a pipeline's GPT on a data set of classes.

    Raises:
        DataError: no classes, a split that is not there, or training images of one class only.
        ConfigError: a GPT for super-resolution, which reads no image by itself.
    """
    if pipeline.gpt.layout.is_upscaling:
        raise ConfigError("probe: this GPT draws from smaller pictures; expected one that draws from prompts")
    if not dataset.labels:
        raise DataError(f"{dataset.folder}: its samples have no classes, which a probe tells; make a data set of "
                        "classes (tools/make_dataset.py ... --labels)")  # fmt: skip
    on_stage("reading images")
    train = _read(pipeline, dataset, config.train_split, config.n_train)
    validation = _read(pipeline, dataset, config.validation_split, config.n_validation)
    n_classes, counts_C = len(dataset.labels), torch.bincount(train.label_N, minlength=len(dataset.labels))
    if (counts_C > 0).sum() < 2:
        raise DataError(f"{dataset.folder}: the {len(train.label_N)} training images are all of one class; expected "
                        "images of two or more")  # fmt: skip

    def accuracy(train_ND: Tensor, validation_ND: Tensor) -> float:
        return _accuracy((train_ND, train.label_N), (validation_ND, validation.label_N), n_classes, config)

    found = {}
    for name, gpt in (("trained", pipeline.gpt), ("random", _untrained(pipeline, config.seed))):
        on_stage(f"features of the {name} GPT")
        features = [layer_features(gpt, samples.ids_NI) for samples in (train, validation)]
        on_stage(f"probes of the {name} GPT")
        found[name] = tuple(accuracy(*of_layer) for of_layer in zip(*features, strict=True))
    on_stage("probes of pixels and ids")
    n_ids = pipeline.vq.config.vocab_size
    pixels = [samples.pixel_ND for samples in (train, validation)]
    counts = [_id_counts(samples.ids_NI, n_ids) for samples in (train, validation)]
    return ProbeResult(
        found["trained"], found["random"], accuracy(*pixels), accuracy(*counts),
        guess=float((validation.label_N == counts_C.argmax()).float().mean()), n_classes=n_classes,
        n_train=len(train.label_N), n_validation=len(validation.label_N),
    )  # fmt: skip


@torch.inference_mode()
def layer_features(gpt: GPT, ids_NI: Tensor) -> list[Tensor]:
    """Features of images by their ids: of each of L + 1 layers (N, D), on the CPU."""
    condition = gpt.config.condition
    null = gpt.reader.null(Vectors(condition.n_vectors) if isinstance(condition, VectorCondition) else ())
    norms = [*(block.attention_norm for block in gpt.transformer.blocks), gpt.transformer.norm]
    features: list[list[Tensor]] = [[] for _ in norms]
    n_image = ids_NI.shape[1]
    hooks = [
        norm.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[:, -n_image:].float().mean(1).cpu()))
        for norm, kept in zip(norms, features, strict=True)
    ]
    try:
        for image_BI in ids_NI.split(_AT_ONCE):
            image_BI = image_BI.to(gpt.device)
            prefix = gpt.reader(gpt.reader.collate([null] * len(image_BI), gpt.device))
            gpt(prefix.then(gpt.layout.image_part(image_BI)))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept) for kept in features]


class _Samples(NamedTuple):
    """Images as their pixels at the image tokenizer's size, their ids, and their classes' numbers."""

    pixel_ND: Tensor
    ids_NI: Tensor
    label_N: Tensor


def _read(pipeline: TextToImage, dataset: DataSet, split_name: str, n: int) -> _Samples:
    """The first `n` images of a split."""
    split, size_px = dataset.split(split_name), pipeline.vq.config.image_size_px
    pairs = [split[index] for index in range(min(n, len(split)))]
    image_B3HW = to_tensor(np.stack([fit_square(pair.image_HW3, size_px) for pair in pairs]))
    ids = [pipeline.vq.encode(part.to(pipeline.gpt.device)).flatten(1).cpu() for part in image_B3HW.split(_AT_ONCE)]
    labels = torch.tensor([dataset.labels.index(pair.label) for pair in pairs])
    return _Samples(image_B3HW.flatten(1), torch.cat(ids), labels)


def _untrained(pipeline: TextToImage, seed: int) -> GPT:
    """The GPT as its training would have begun."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gpt = GPT(pipeline.gpt.config).eval()
        gpt.start_from_codes(pipeline.vq.codes().cpu())
    return gpt.to(pipeline.gpt.device)


def _id_counts(ids_NI: Tensor, n_ids: int) -> Tensor:
    return torch.zeros(len(ids_NI), n_ids).scatter_add_(1, ids_NI, torch.ones(ids_NI.shape))


def _accuracy(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], n_classes: int, config: ProbeConfig
) -> float:
    """Share of the validation images that a regression on the training images puts right; each: features, labels."""
    mean_D, std_D = train[0].mean(0), train[0].std(0).clamp_min(1e-6)
    x_ND, weight_DC = (train[0] - mean_D) / std_D, torch.zeros(train[0].shape[1], n_classes, requires_grad=True)
    bias_C = torch.zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_DC, bias_C], max_iter=config.steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x_ND @ weight_DC + bias_C, train[1]) + config.penalty * weight_DC.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found_N = (((validation[0] - mean_D) / std_D) @ weight_DC + bias_C).argmax(-1)
    return float((found_N == validation[1]).float().mean())
