"""A CLIP of `transformers` as a scorer, from a local folder: config.json, model.safetensors, tokenizer.json.

B batch, S text length, E embedding width
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqt2i.checkpoint import CONFIG, load_model
from vqt2i.clip.model import CLIP, CLIPConfig
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import sha256_of_parts
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text.huggingface import FILE as TOKENIZER
from vqt2i.text.huggingface import HuggingFaceTokenizer

CONFIG_JSON, WEIGHTS = "config.json", "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
# of the pixels in [0, 1] that CLIP was trained on (Radford et al. 2021, github.com/openai/CLIP)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class HuggingFaceConfig(NamedTuple):
    """What is asked of a scorer; as in `CLIPConfig`. text_length: without the marks at a text's ends."""

    image_size_px: int
    n_patches: int
    text_length: int
    embedding_width: int
    vision: TransformerConfig
    text: TransformerConfig
    text_tokenizer: str

    @classmethod
    def of(cls, model: nn.Module, text_tokenizer: str) -> "HuggingFaceConfig":
        """That of a `CLIPModel` with the tokenizer of this fingerprint."""
        vision, text = model.config.vision_config, model.config.text_config
        sizes = [
            TransformerConfig(width=part.hidden_size, n_layers=part.num_hidden_layers,
                              n_heads=part.num_attention_heads, mlp_width=part.intermediate_size)
            for part in (vision, text)
        ]  # fmt: skip
        n_patches = (vision.image_size // vision.patch_size) ** 2
        text_length, width = text.max_position_embeddings - 2, model.config.projection_dim
        return cls(vision.image_size, n_patches, text_length, width, *sizes, text_tokenizer)


class HuggingFaceCLIP(nn.Module):
    """A `CLIPModel` with the methods of our `CLIP`."""

    def __init__(self, model: nn.Module, config: HuggingFaceConfig, marks: tuple[int, int],
                 mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:  # fmt: skip
        """marks: ids of a text's start and end. mean, std: of pixels in [0, 1]."""
        super().__init__()
        self.model, self.config, self.marks = model, config, marks
        self.register_buffer("mean_311", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std_311", torch.tensor(std)[:, None, None], persistent=False)

    def encode_image(self, image_B3HW: Tensor) -> Tensor:
        """As `CLIP.encode_image`."""
        pixels = ((image_B3HW + 1) / 2 - self.mean_311) / self.std_311
        hidden_BD = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(hidden_BD).float(), dim=-1)

    def encode_text(self, ids_BS: Tensor, n_ids_B: Tensor) -> Tensor:
        """As `CLIP.encode_text`; the marks are added here."""
        start, end = self.marks
        place_BS = torch.arange(ids_BS.shape[1] + 2, device=ids_BS.device).expand(len(ids_BS), -1)
        # what follows a text is its end again and again: the first one is what the embedding is read from
        ids = F.pad(F.pad(ids_BS, (1, 0), value=start), (0, 1), value=end)
        ids = ids.masked_fill(place_BS > n_ids_B[:, None], end)
        seen = (place_BS <= n_ids_B[:, None] + 1).long()
        hidden_BD = self.model.text_model(input_ids=ids, attention_mask=seen).pooler_output
        return F.normalize(self.model.text_projection(hidden_BD).float(), dim=-1)


def load_scorer(folder: Path) -> CLIP | HuggingFaceCLIP:
    """The scorer in a folder: ours, or a `CLIPModel` that `transformers` saved. Nothing is fetched.

    Raises:
        CheckpointError: no scorer there, or a damaged one. ConfigError: `transformers` is not installed.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file() or not (folder / CONFIG_JSON).is_file():
        return load_model(folder, CLIPConfig, CLIP)
    try:
        from transformers import CLIPModel
    except ImportError:
        raise ConfigError(f"{folder}: needs `transformers`; pip install 'vqt2i[clip]'") from None
    fingerprint, content = fingerprint_of(folder), _read(folder, TOKENIZER)
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        pixels = json.loads((folder / PREPROCESSOR).read_text()) if (folder / PREPROCESSOR).is_file() else {}
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: not a CLIPModel of `transformers` ({error})") from None
    tokenizer = HuggingFaceTokenizer(content, str(folder / TOKENIZER))
    config, marks = HuggingFaceConfig.of(model, tokenizer.fingerprint), (tokenizer.start, tokenizer.end)
    scorer = HuggingFaceCLIP(model, config, marks, pixels.get("image_mean", MEAN), pixels.get("image_std", STD))
    scorer.fingerprint = fingerprint
    return scorer.eval()


def fingerprint_of(folder: Path) -> str:
    """Content hash of a scorer that `transformers` saved, with its tokenizer."""
    return sha256_of_parts(*(_read(folder, name) for name in (CONFIG_JSON, WEIGHTS, TOKENIZER)))


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        expected = f"a CLIPModel of `transformers` with {CONFIG_JSON}, {WEIGHTS} and {TOKENIZER}"
        raise CheckpointError(f"{folder / name}: {error.strerror}; expected {expected}") from None
