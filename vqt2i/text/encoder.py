"""Features of texts by the encoder of a T5 (Raffel et al. 2020, arXiv 1910.10683), from a folder of `transformers`.

S text length, C features
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.files import sha256_of_parts
from vqt2i.text.tokenizer import TextTokenizer

CONFIG_JSON, TOKENIZER = "config.json", "spiece.model"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class TextEncoder:
    """Texts to a vector for each of their ids and for the mark of their end.

    Attributes:
        tokenizer: SentencePiece's, whose ids have no mark of the end.
        fingerprint: content hash of tokenizer and weights. width: of the vectors.
    """

    def __init__(self, tokenizer: TextTokenizer, model: nn.Module, fingerprint: str) -> None:
        self.tokenizer, self.model, self.fingerprint = tokenizer, model.eval().requires_grad_(False), fingerprint
        self.width: int = model.config.d_model
        self.end: int = model.config.eos_token_id

    @classmethod
    def load(cls, folder: Path) -> "TextEncoder":
        """Load a folder with `config.json`, safetensors and `spiece.model`, as that of `google/flan-t5-xl`; nothing is
        fetched.

        Raises:
            CheckpointError: a file is missing or damaged. ConfigError: `transformers` is not installed.
        """
        folder = Path(folder)
        fingerprint = fingerprint_of(folder)
        try:
            from transformers import T5EncoderModel
        except ImportError:
            raise ConfigError(f"{folder}: needs `transformers`; pip install 'vqt2i[t5]'") from None
        try:
            model = T5EncoderModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="float32")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: not a T5 of `transformers` ({error})") from None
        tokenizer = TextTokenizer.load(folder / TOKENIZER)
        if tokenizer.n_ids > model.config.vocab_size:
            raise CheckpointError(f"{folder}: its tokenizer has {tokenizer.n_ids:,} ids, the model knows "
                                  f"{model.config.vocab_size:,}; they do not belong together")  # fmt: skip
        return cls(tokenizer, model, fingerprint)

    def ids(self, text: str, most: int) -> list[int]:
        """The ids of a text and the mark of its end, `most` in all; what does not fit is cut off before the mark."""
        return [*self.tokenizer.encode(text)[: most - 1], self.end]

    @torch.inference_mode()
    def features(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """The vectors of texts that `ids` gave, (S, C) float32 each."""
        device, longest = self.model.device, max(map(len, ids))
        ids_BS = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=device)
        real_BS = torch.tensor([[s < len(row) for s in range(longest)] for row in ids], device=device)
        hidden_BSC = self.model(input_ids=ids_BS, attention_mask=real_BS.long()).last_hidden_state.float()
        return [hidden_SC[: len(row)] for hidden_SC, row in zip(hidden_BSC, ids, strict=True)]


def fingerprint_of(folder: Path, width: int | None = None) -> str:
    """Content hash of an encoder's tokenizer and weights.

    Args:
        width: that its features must have; None is any.

    Raises:
        CheckpointError: a file is missing, or it is no T5 of such features.
    """
    config = _read_json(folder / CONFIG_JSON)
    if config.get("model_type") != "t5":
        raise CheckpointError(f"{folder}: a model of type {config.get('model_type')!r}, expected a T5")
    if width not in (None, config.get("d_model")):
        raise CheckpointError(f"{folder}: its features are {config.get('d_model')} wide, expected {width}; "
                              "Flan-T5 XL has 2048")  # fmt: skip
    files = [folder / CONFIG_JSON, folder / TOKENIZER]
    if (folder / INDEX).is_file():
        files += [folder / name for name in sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))]
    else:
        files.append(folder / WEIGHTS)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: not there; expected a T5 of `transformers`: {CONFIG_JSON}, {TOKENIZER} and "
                                  f"{WEIGHTS}, or several of these with {INDEX}")  # fmt: skip
    return sha256_of_parts(*files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}; expected a T5 of `transformers`"
                              ) from None  # fmt: skip
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values
