"""What an importer of one family of public checkpoints is, and what runs it: read, recognise, convert, check."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vqt2i.clip import CLIP, CLIPConfig
from vqt2i.config import Config
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.peers.reading import Checkpoint, read_checkpoint
from vqt2i.peers.table import Table
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

Kind = Literal["vqgan", "gpt", "upscaler", "clip"]
MODELS: dict[Kind, tuple[type[Config], type[nn.Module]]] = {
    "vqgan": (ImageTokenizerConfig, ImageTokenizer),
    "gpt": (GPTConfig, GPT),
    "upscaler": (GPTConfig, GPT),
    "clip": (CLIPConfig, CLIP),
}


class Options(NamedTuple):
    """What the weights do not tell.

    settings: a file of the family's own format with its settings; None is one that lies beside the checkpoint.
    image_size_px: side of the images that an image tokenizer is for. vq: folder of the image tokenizer that made a
    GPT's ids. text_encoder: folder of the encoder whose features a GPT reads. text: a file or folder with the tokenizer
    of a scorer; None is one that lies beside the checkpoint.
    """

    settings: Path | None = None
    image_size_px: int | None = None
    vq: Path | None = None
    text_encoder: Path | None = None
    text: Path | None = None


class Compared(NamedTuple):
    """One output of a model beside the published code's. found: the largest difference, or how many ids differ."""

    name: str
    found: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.found <= self.allowed  # false for NaN


class Family(ABC):
    """One family: from a checkpoint to our configuration and a table of names, and back where it has a `project`.

    Attributes:
        name: what the user calls it. kind: of our model. repository, licence: of code and weights, as their authors
            state them.
        markers: names that its checkpoints have and no others do together. unused: names of `Options` that mean nothing
            to it.
        project: the name that `export --to` knows it by; None where there is no way back. weights_file, weights_key:
            where its own code looks for the weights, and under which key, which safetensors have none of.
            settings_file: JSON, or YAML by its name.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    repository: ClassVar[str]
    licence: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    unused: ClassVar[tuple[str, ...]] = ()
    project: ClassVar[str | None] = None
    weights_file: ClassVar[str]
    weights_key: ClassVar[str]
    settings_file: ClassVar[str]

    def read(self, path: Path) -> Checkpoint:
        """The checkpoint's tensors by name."""
        return read_checkpoint(path)

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a checkpoint is of this family, by the names in it."""
        return all(name in tensors for name in self.markers)

    def of(self, checkpoint: Checkpoint, options: Options) -> "Family":
        """The importer of this checkpoint: where weights are published under several names, or their order follows from
        what lies beside them."""
        return self

    @abstractmethod
    def config(self, checkpoint: Checkpoint, options: Options) -> Config:
        """Our configuration, from the shapes of the weights and the settings beside them.

        Raises:
            CheckpointError, ConfigError: something that we have no choice for, or that nothing tells.
        """

    @abstractmethod
    def table(self, config: Config) -> Table:
        """Our names, and what of theirs each is made of."""

    def ignored(self, name: str) -> bool:
        """Whether a name that the table does not read may be there: a discriminator, say."""
        return False

    def facts(self, config: Config, options: Options) -> dict[str, Any]:
        """What our card of the model says besides its source and licence."""
        return {}

    def files(self, checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
        """What lies in the model's folder besides its own files, by name: a tokenizer, say."""
        return {}

    def misfits(self, config: Config) -> list[str]:
        """What of a model of ours the family has no place for, as "setting value"; none if it can be written."""
        raise NotImplementedError

    def settings_of(self, config: Config) -> dict[str, Any]:
        """The settings that the family's own code builds such a model from."""
        raise NotImplementedError

    def more_tensors(self) -> dict[str, Tensor]:
        """What the family's own code wants among the weights besides what the table has."""
        return {}

    def more_files(self, config: Config, folder: Path) -> dict[str, bytes]:
        """What it wants beside the weights and settings of the model in `folder`, by name."""
        return {}

    @abstractmethod
    def compare(self, model: nn.Module, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """The model's outputs beside recorded ones, of those inputs and outputs that are there."""


def differing(config: Config, expected: dict[str, Any]) -> list[str]:
    """The settings of a configuration, by dotted names, that are not as expected, as "setting value"."""
    found = []
    for name, value in expected.items():
        own: Any = config
        for part in name.split("."):
            own = getattr(own, part, None)
        if own != value:
            found.append(f"{name} {own}")
    return found


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Of two tensors of one shape; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).abs().max())


def n_different(found: Tensor, expected: Tensor) -> float:
    """How many ids differ; infinite where the shapes do."""
    return float((found != expected).sum()) if found.shape == expected.shape else float("inf")


def compare_tokenizer(
    model: ImageTokenizer, io: Mapping[str, Tensor], latents: Callable[[Tensor], Tensor], tolerance: float = 1e-4
) -> Iterator[Compared]:
    """Of images `x` and such as `x_rect`: latents `z`, ids `indices`, and the picture of these, unclamped, `rec`.

    latents: from images to what is quantized.
    """
    with torch.inference_mode():
        for suffix in (name.removeprefix("rec") for name in io if name == "rec" or name.startswith("rec_")):
            if f"x{suffix}" not in io:
                continue
            images = io[f"x{suffix}"].float()
            ids_BHW = io[f"indices{suffix}"]
            pictures = model.decoder(model.quantizer.decode(ids_BHW))
            if f"z{suffix}" in io:
                yield Compared(f"z{suffix}", largest_difference(latents(images), io[f"z{suffix}"]), tolerance)
            yield Compared(f"indices{suffix}", n_different(model.encode(images), ids_BHW), 0)
            yield Compared(f"rec{suffix}", largest_difference(pictures, io[f"rec{suffix}"]), tolerance)
