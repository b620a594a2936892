"""minDALL-E (Kim et al. 2021, github.com/kakaobrain/minDALL-E): a VQGAN, and a GPT of bare texts and images.

A release is a folder with `config.yaml`, `stage1_last.ckpt`, `stage2_last.ckpt` and a tokenizer in `tokenizer/`. What
the settings leave out is as in the published model.

S text length
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.config import build_config, read_yaml_mapping
from vqt2i.errors import CheckpointError
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.peers.family import Compared, Family, Options, largest_difference
from vqt2i.peers.gpts import (
    TOLERANCE,
    behind_zero,
    compare_drawn,
    image_logits,
    image_tokenizer_facts,
    image_tokenizer_of,
    require_length,
)
from vqt2i.peers.reading import Checkpoint
from vqt2i.peers.table import Mixed, Table, prefixed, with_weights
from vqt2i.peers.taming import TamingVQGAN, require_same_settings
from vqt2i.peers.vqgan import count
from vqt2i.text import TextBatch
from vqt2i.text.huggingface import HuggingFaceTokenizer, find_character_tokenizer
from vqt2i.vq import ImageTokenizer

REPOSITORY = "https://github.com/kakaobrain/minDALL-E"
SETTINGS, TOKENIZER, PAD = "config.yaml", "tokenizer", "[PAD]"
IMAGE_SIZE_PX, WIDTH, N_HEADS = 256, 1536, 24  # of the published model


def find_settings(path: Path, given: Path | None, part: str) -> dict[str, Any]:
    """What the settings say of a part, "stage1" or "stage2", with `file`; empty where there are none.

    Raises:
        ConfigError: they cannot be read. CheckpointError: they are of another model.
    """
    file = given or path.parent / SETTINGS
    if given is None and not file.is_file():
        return {}
    values = read_yaml_mapping(file)
    stage = values.get(part, {})
    if not isinstance(stage, dict) or not isinstance(stage.get("hparams", {}), dict):
        raise CheckpointError(f"{file}: expected the settings of minDALL-E, with {part}.hparams")
    return stage | stage.get("hparams", {}) | {"file": file}


class MinDalleVQ(TamingVQGAN):
    """Stage 1: taming-transformers' VQGAN, trained on."""

    name = "mindalle-vq"
    repository = REPOSITORY
    licence = "Apache-2.0"
    project = None

    def settings(self, path: Path, options: Options) -> dict[str, Any]:
        return find_settings(path, options.settings, "stage1")

    def compare(self, model: ImageTokenizer, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Latents, ids, pictures of these, and those of ids that the GPT drew."""
        side = (model.config.grid_height, model.config.grid_width)
        yield from super().compare(model, dict(io) | {"indices": io["codes"].unflatten(1, side)})
        with torch.inference_mode():
            drawn = model.decoder(model.quantizer.decode(io["gen_codes"].unflatten(1, side)))
            yield Compared("gen_decoded", largest_difference(drawn, io["gen_decoded"]), TOLERANCE)
            pixels = (model.decode(io["gen_codes"].unflatten(1, side)) + 1) / 2
            yield Compared("gen_pixels", largest_difference(pixels, io["gen_pixels"]), TOLERANCE)


BLOCK = with_weights({
    "attention_norm": "ln1", "attention.qkv": ("attn.query", "attn.key", "attn.value"), "attention.out": "attn.proj",
    "mlp_norm": "ln2", "mlp.up": "mlp.0", "mlp.down": "mlp.2",
})  # fmt: skip


class MinDalleGPT(Family):
    """Stage 2. Places that a text leaves free hold one id there, [PAD], and are seen; ours hold an id each, whose
    vectors begin as that one's.

    tokenizer, pad: of the checkpoint at hand.
    """

    name = "mindalle-gpt"
    kind = "gpt"
    unused = ("image_size_px", "text_encoder")
    repository = REPOSITORY
    licence = "CC-BY-NC-SA-4.0"
    markers = (
        "tok_emb_txt.weight", "tok_emb_img.weight", "pos_emb_txt.weight", "pos_emb_img.weight", "blocks.0.ln1.weight",
        "blocks.0.mlp.0.weight",
    )  # fmt: skip

    def __init__(self, tokenizer: HuggingFaceTokenizer | None = None, pad: int = -1) -> None:
        self.tokenizer, self.pad = tokenizer, pad

    def of(self, checkpoint: Checkpoint, options: Options) -> "MinDalleGPT":
        path = options.text or checkpoint.path.parent / TOKENIZER
        tokenizer = find_character_tokenizer(path, special=PAD)
        pad, n_ids = tokenizer.id_of(PAD), len(checkpoint.tensors["tok_emb_txt.weight"])
        if pad is None or tokenizer.n_ids > n_ids:
            raise CheckpointError(f"{path}: has {tokenizer.n_ids:,} ids, the model knows {n_ids:,}; give the tokenizer "
                                  "of the model by --text")  # fmt: skip
        return MinDalleGPT(tokenizer, pad)

    def config(self, checkpoint: Checkpoint, options: Options) -> GPTConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        settings = find_settings(path, options.settings, "stage2")
        (n_text_ids, width), n_image_ids = theirs["tok_emb_txt.weight"].shape, len(theirs["tok_emb_img.weight"])
        n_layers, text_length = count(theirs, "blocks.{}.ln1.weight"), len(theirs["pos_emb_txt.weight"])
        length = len(theirs["pos_emb_img.weight"])
        told = {
            "embed_dim": width, "n_layers": n_layers, "vocab_size_txt": n_text_ids, "vocab_size_img": n_image_ids,
            "ctx_len_txt": text_length, "ctx_len_img": length,
        }  # fmt: skip
        require_same_settings(path, told, settings)
        if width != WIDTH and "n_heads" not in settings:
            raise CheckpointError(f"{path}: of width {width}, which is not the published model's, so nothing tells the "
                                  f"number of heads; put its {SETTINGS} beside it, or give it by --settings"
                                  )  # fmt: skip
        vq = image_tokenizer_of(self.name, MinDalleVQ.name, path, options, n_image_ids)
        require_length(path, length, options, vq)
        values = {
            "transformer": {
                "width": width, "n_layers": n_layers, "n_heads": settings.get("n_heads", N_HEADS), "norm": "layer",
                "norm_eps": 1e-5, "mlp": "gelu_quick" if settings.get("gelu_use_approx") else "gelu",
                "mlp_width": len(theirs["blocks.0.mlp.0.weight"]), "bias": True, "qk_norm": False,
            },
            "layout": {
                "n_text_ids": n_text_ids, "n_image_ids": n_image_ids, "text_length": text_length, "padding": "bare",
                "grid_height": vq.grid_height, "grid_width": vq.grid_width,
            },
            "positions": "raster",
            "text_tokenizer": self.tokenizer.fingerprint,
            "image_tokenizer": read_card(options.vq)["fingerprint"],
        }  # fmt: skip
        return build_config(GPTConfig, values, str(path))

    def table(self, config: GPTConfig) -> Table:
        layout = config.layout
        sizes = (layout.n_text_ids, layout.n_image_ids)

        def joined(text_VD: Tensor, image_VD: Tensor) -> Tensor:
            return torch.cat((text_VD, image_VD, text_VD[self.pad].expand(layout.text_length, -1)))

        table: Table = {
            "embedding.weight": Mixed(
                ("tok_emb_txt.weight", "tok_emb_img.weight"), joined, lambda rows: rows[: sum(sizes)].split(sizes)
            ),
            "position_embeddings.0.weight": behind_zero("pos_emb_txt.weight"),
            "position_embeddings.1.weight": behind_zero("pos_emb_img.weight"),
            "head.weight": ("head_txt.weight", "head_img.weight"),
        } | with_weights({"transformer.norm": "ln_f"})
        if layout.n_text_ids != layout.n_image_ids:
            table["head.weight"] = Mixed(table["head.weight"], lambda *rows: torch.cat(rows), lambda r: r.split(sizes))
        for layer in range(config.transformer.n_layers):
            table |= prefixed(f"transformer.blocks.{layer}.", f"blocks.{layer}.", BLOCK)
        return table

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        return image_tokenizer_facts(config, options) | {"reversed_share": 0.0}

    def files(self, checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
        return self.tokenizer.files

    def compare(self, model: GPT, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Logits of text and image after what stands before, and greedy ids."""
        ids_BS = io["text_ids"]
        text = TextBatch(ids_BS, ids_BS.shape[1] - (ids_BS.flip(1) == self.pad).long().cumprod(1).sum(1))
        with torch.inference_mode():
            hidden = model(model.layout.join(text, io["codes"]).until(-1))
            scored = model.text_logits(hidden[:, model.layout.text_targets(reversed_order=False)])
        yield Compared("tf_logits_txt", largest_difference(scored, io["tf_logits_txt"]), TOLERANCE)
        logits = image_logits(model, text, io["codes"])
        yield Compared("tf_logits_img", largest_difference(logits, io["tf_logits_img"]), TOLERANCE)
        yield from compare_drawn(model, text, io)
