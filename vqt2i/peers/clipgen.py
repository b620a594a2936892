"""CLIP-GEN (Wang et al. 2022, arXiv 2203.00386; github.com/HFAiLab/clip-gen): its VQGAN, its GPT, which reads an
embedding by CLIP ViT-B/32 before an image, and that CLIP.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.config import build_config
from vqt2i.errors import CheckpointError
from vqt2i.gpt import GPT, GPTConfig, VectorBatch
from vqt2i.peers.arguments import find_arguments
from vqt2i.peers.clip import OPENAI, CLIPFamily
from vqt2i.peers.family import Compared, Family, Options, compare_tokenizer, largest_difference
from vqt2i.peers.gpts import (
    TOLERANCE,
    compare_drawn,
    image_logits,
    image_tokenizer_facts,
    image_tokenizer_of,
    require_length,
)
from vqt2i.peers.reading import Checkpoint
from vqt2i.peers.table import Changed, Fill, Table, prefixed, with_weights
from vqt2i.peers.vqgan import count, decoder_layers, encoder_layers
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

REPOSITORY = "https://github.com/HFAiLab/clip-gen"
IMAGE_SIZE_PX = 256

# ---- scorer ----------------------------------------------------------------------------------------------------------


class ClipGenCLIP(CLIPFamily):
    """OpenAI's weights by OpenAI's names, without the numbers that OpenAI's files have among them."""

    name = "clip-gen-clip"
    repository = REPOSITORY
    project = None
    is_openai = True

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        return set(OPENAI.markers) <= tensors.keys()


# ---- image tokenizer -------------------------------------------------------------------------------------------------

RES_BLOCK = with_weights({"norm1": "block.0", "conv1": "block.2", "norm2": "block.3", "conv2": "block.6"})
SKIP = with_weights({"skip": "shortcut"})
CONV = with_weights({"conv": "conv"})


def as_convolution(name: str) -> Changed:
    """A matrix over channels as a convolution of 1 x 1."""
    return Changed(name, lambda weight: weight[..., None, None], lambda weight: weight[..., 0, 0])


ATTENTION: Table = {
    "qkv.weight": as_convolution("attn.in_proj_weight"), "qkv.bias": "attn.in_proj_bias",
    "out.weight": as_convolution("attn.out_proj.weight"), "out.bias": "attn.out_proj.bias",
} | with_weights({"norm": "norm"})  # fmt: skip


class ClipGenVQ(Family):
    """taming-transformers' VQGAN with PyTorch's own `eps` of norms; layers are numbered as they run."""

    name = "clip-gen-vq"
    kind = "vqgan"
    unused = ("settings", "vq", "text_encoder", "text")
    repository = REPOSITORY
    licence = "MIT"
    markers = (
        "encoder.conv_in.weight", "encoder.down.0.block.6.weight", "encoder.final.2.weight", "encoder.final.3.weight",
        "decoder.quant_conv_in.weight", "quantizer.embedding.weight",
    )  # fmt: skip

    def config(self, checkpoint: Checkpoint, options: Options) -> ImageTokenizerConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        # at each number stands a block, attention, or a step down to the next level
        levels: list[dict[str, Any]] = [{"n": 0, "attention": False}]
        n = 0
        while any(name.startswith(f"encoder.down.{n}.") for name in theirs):
            if f"encoder.down.{n}.conv.weight" in theirs:
                levels.append({"n": 0, "attention": False})
            elif f"encoder.down.{n}.norm.weight" in theirs:
                levels[-1]["attention"] = True
            elif f"encoder.down.{n}.block.6.weight" in theirs:
                levels[-1]["n"] += 1
                levels[-1]["width"] = len(theirs[f"encoder.down.{n}.block.6.weight"])
            n += 1
        if any(level["n"] == 0 for level in levels):
            raise CheckpointError(f"{path}: lacks the blocks of a level of encoder.down; is it whole? Copy it again")
        image_size_px = options.image_size_px or IMAGE_SIZE_PX
        n_codes, code_dim = theirs["quantizer.embedding.weight"].shape
        quantizer = {
            "kind": "vq", "codebook_size": n_codes, "code_dim": code_dim, "l2_normalised": False, "update": "gradient",
            "codebook_weight": 1.0, "commitment_weight": 0.25, "restart_below": 0,
        }  # fmt: skip
        values = {
            "image_size_px": image_size_px, "downsample": 2 ** (len(levels) - 1), "architecture": "taming",
            "patch_px": 1, "channels": [level["width"] for level in levels],
            "stem_channels": len(theirs["encoder.conv_in.weight"]),
            "latent_channels": len(theirs["encoder.final.2.weight"]), "n_res_blocks": levels[0]["n"],
            "attention_sizes_px": [image_size_px >> i for i, level in enumerate(levels) if level["attention"]],
            "norm_eps": 1e-5, "quantizer": quantizer,
        }  # fmt: skip
        return build_config(ImageTokenizerConfig, values, str(path))

    def table(self, config: ImageTokenizerConfig) -> Table:
        ends = {
            "encoder.conv_in": "encoder.conv_in", "encoder.norm_out": "encoder.final.0",
            "encoder.conv_out": "encoder.final.2", "quantizer.to_code": "encoder.final.3",
            "quantizer.from_code": "decoder.quant_conv_in", "decoder.conv_in": "decoder.conv_in",
            "decoder.norm_out": "decoder.final.0", "decoder.conv_out": "decoder.final.2",
        }  # fmt: skip
        table = with_weights(ends) | {
            "quantizer.codebook": "quantizer.embedding.weight", "quantizer.usage": Fill(1.0),
            "quantizer.n_updates": Fill(0),
        }  # fmt: skip
        parts = (("encoder", "down", encoder_layers(config)), ("decoder", "up", decoder_layers(config)))
        for part, run, layers in parts:
            numbers = {"mid": 0, run: 0}
            for n, (kind, level, _, widens) in enumerate(layers):
                where = "mid" if level < 0 else run
                rows = {"res": RES_BLOCK | (SKIP if widens else {}), "attention": ATTENTION}.get(kind, CONV)
                table |= prefixed(f"{part}.layers.{n}.", f"{part}.{where}.{numbers[where]}.", rows)
                numbers[where] += 1
        return table

    def ignored(self, name: str) -> bool:
        return name.startswith("discriminator.")

    def compare(self, model: ImageTokenizer, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        return compare_tokenizer(model, io, lambda x: model.quantizer.to_code(model.encoder(x)))


# ---- GPT -------------------------------------------------------------------------------------------------------------

BLOCK: Table = with_weights({
    "attention_norm": "norm1", "attention.out": "self_attn.out_proj", "mlp_norm": "norm2", "mlp.up": "linear1",
    "mlp.down": "linear2",
}) | {f"attention.qkv.{kind}": f"self_attn.in_proj_{kind}" for kind in ("weight", "bias")}  # fmt: skip
N_HEADS = {(24, 1024): 16}  # by (layers, width): "gpt2_medium"


class ClipGenGPT(Family):
    """The embedding has the first position, so that the last id is never read. It knows no null."""

    name = "clip-gen-gpt"
    kind = "gpt"
    unused = ("image_size_px", "text")
    repository = REPOSITORY
    licence = "MIT"
    markers = ("pos_emb", "tok_emb.weight", "cond_proj.weight", "blocks.0.encoder.linear1.weight", "head.bias")

    def config(self, checkpoint: Checkpoint, options: Options) -> GPTConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        arguments = find_arguments(path, options.settings)
        arguments = arguments.get("gpt", arguments)
        n_image_ids, width = theirs["tok_emb.weight"].shape
        n_layers = count(theirs, "blocks.{}.encoder.linear1.weight")
        n_heads = arguments.get("n_head", N_HEADS.get((n_layers, width)))
        if n_heads is None:
            raise CheckpointError(f"{path}: {n_layers} layers of width {width} are no published size, so nothing tells "
                                  'the number of heads; write {"n_head": N} into a JSON file and give it by --settings'
                                  )  # fmt: skip
        vq = image_tokenizer_of(self.name, ClipGenVQ.name, path, options, n_image_ids)
        require_length(path, theirs["pos_emb"].shape[1], options, vq)
        if options.text_encoder is None:
            raise CheckpointError(f"{self.name}: reads embeddings by CLIP ViT-B/32; import that one first (clip) and "
                                  "give its folder by --text-encoder")  # fmt: skip
        values = {
            "transformer": {
                "width": width, "n_layers": n_layers, "n_heads": n_heads, "norm": "layer", "norm_eps": 1e-5,
                "mlp": "gelu", "mlp_width": len(theirs["blocks.0.encoder.linear1.weight"]), "bias": True,
                "qk_norm": False,
            },
            "layout": {"n_image_ids": n_image_ids, "grid_height": vq.grid_height, "grid_width": vq.grid_width},
            "condition": {
                "kind": "vectors", "width": theirs["cond_proj.weight"].shape[1],
                "encoder": read_card(options.text_encoder)["fingerprint"],
            },
            "positions": "sequence",
            "head": {"bias": True},
            "image_tokenizer": read_card(options.vq)["fingerprint"],
        }  # fmt: skip
        return build_config(GPTConfig, values, str(path))

    def table(self, config: GPTConfig) -> Table:
        names = {"transformer.norm": "norm", "head": "head", "reader.projection": "cond_proj"}
        table: Table = with_weights(names) | {
            "embedding.weight": "tok_emb.weight",
            # the last id, which is never read, has a position in ours
            "position_embeddings.0.weight": Changed(
                "pos_emb", lambda rows: F.pad(rows[0], (0, 0, 0, 1)), lambda rows: rows[None, :-1]
            ),
            "reader.null_vectors": Fill(0.0),
            "reader.text_shift": Fill(0.0),
        }
        for layer in range(config.transformer.n_layers):
            table |= prefixed(f"transformer.blocks.{layer}.", f"blocks.{layer}.encoder.", BLOCK)
        return table

    def ignored(self, name: str) -> bool:
        return name.startswith("blocks.") and name.endswith(".mask")  # the causal one

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        scorer = {"path": str(options.text_encoder), "fingerprint": config.condition.encoder}
        return image_tokenizer_facts(config, options) | {"scorer": scorer}

    def compare(self, model: GPT, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Logits of ids after an embedding and those before, and greedy ids."""
        vectors_BNC = io["cond"][:, None]
        real_BN = torch.ones(vectors_BNC.shape[:2], dtype=torch.bool)
        condition = VectorBatch(vectors_BNC, real_BN, ~real_BN[:, 0])
        logits = image_logits(model, condition, io["tokens"])
        yield Compared("tf_logits", largest_difference(logits, io["tf_logits"]), TOLERANCE)
        yield from compare_drawn(model, condition, io)
