"""LlamaGen (Sun et al. 2024, arXiv 2406.06525): its image tokenizer, and its GPTs of classes and of texts.

There are no settings beside the published weights: what these do not tell follows from the name of a published size, or
is in a `config.json` of the model's arguments.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.config import build_config
from vqt2i.errors import CheckpointError
from vqt2i.gpt import GPT, ConditionBatch, GPTConfig, VectorBatch
from vqt2i.peers.arguments import find_arguments, require_same_arguments
from vqt2i.peers.family import Compared, Family, Options, compare_tokenizer, differing, largest_difference, n_different
from vqt2i.peers.gpts import image_logits, image_tokenizer_of
from vqt2i.peers.reading import Checkpoint
from vqt2i.peers.table import Changed, Fill, Joined, Table, prefixed, with_weights
from vqt2i.peers.vqgan import attention_sizes, count, network_misfits, network_table
from vqt2i.text.encoder import fingerprint_of
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

REPOSITORY = "https://github.com/FoundationVision/LlamaGen"
IMAGE_SIZE_PX = 256
TOLERANCE = 1e-4
N_FEATURES = 120  # positions of a text, always
EXAMPLES = (207, 360, 387, 974, 88, 979, 417, 279)  # the classes of its authors' examples: ImageNet's
# heads of the published sizes, by (layers, width): B, L, XL, XXL, XXXL, 1B, 3B, 7B
N_HEADS = {
    (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (48, 2560): 40, (22, 2048): 32, (24, 3200): 32,
    (32, 4096): 32,
}  # fmt: skip


# ---- image tokenizer -------------------------------------------------------------------------------------------------


class LlamaGenVQ(Family):
    """VQ-16 and VQ-8. Attention stands at the coarsest level alone, whatever the size of the images."""

    name = "llamagen-vq"
    kind = "vqgan"
    repository = REPOSITORY
    licence = "MIT"
    markers = (
        "encoder.conv_in.weight", "encoder.conv_out.weight", "encoder.conv_blocks.0.res.0.conv1.weight",
        "quantize.embedding.weight",
    )  # fmt: skip
    unused = ("vq", "text_encoder", "text")
    project = "llamagen"
    weights_file, weights_key, settings_file = "vq_model.pt", "model", "config.json"

    def config(self, checkpoint: Checkpoint, options: Options) -> ImageTokenizerConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        arguments = find_arguments(path, options.settings)
        n_levels = count(theirs, "encoder.conv_blocks.{}.res.0.conv1.weight")
        channels = [theirs[f"encoder.conv_blocks.{level}.res.0.conv1.weight"].shape[0] for level in range(n_levels)]
        n_codes, code_dim = theirs["quantize.embedding.weight"].shape
        require_same_arguments(path, {"codebook_size": n_codes, "codebook_embed_dim": code_dim}, arguments)
        image_size_px = IMAGE_SIZE_PX if options.image_size_px is None else options.image_size_px
        quantizer = {
            "kind": "vq", "codebook_size": n_codes, "code_dim": code_dim, "update": "gradient", "codebook_weight": 1.0,
            "commitment_weight": 0.25, "l2_normalised": arguments.get("codebook_l2_norm", True), "restart_below": 0,
        }  # fmt: skip
        values = {
            "image_size_px": image_size_px, "downsample": 2 ** (n_levels - 1), "architecture": "taming", "patch_px": 1,
            "channels": channels, "stem_channels": theirs["encoder.conv_in.weight"].shape[0],
            "latent_channels": theirs["encoder.conv_out.weight"].shape[0],
            "n_res_blocks": count(theirs, "encoder.conv_blocks.0.res.{}.conv1.weight"),
            "attention_sizes_px": attention_sizes([n_levels - 1], image_size_px), "quantizer": quantizer,
        }  # fmt: skip
        return build_config(ImageTokenizerConfig, values, str(path))

    def table(self, config: ImageTokenizerConfig) -> Table:
        deepest = len(config.channels) - 1

        def place(kind: str, level: int, index: int, *, decoder: bool) -> str:
            if level < 0:
                return f"mid.{index}"
            names = {"res": f"res.{index}", "attention": f"attn.{index}", "down": "downsample", "up": "upsample"}
            return f"conv_blocks.{deepest - level if decoder else level}.{names[kind]}"  # in the order of computation

        return (
            network_table(config, partial(place, decoder=False), partial(place, decoder=True))
            | with_weights({"quantizer.to_code": "quant_conv", "quantizer.from_code": "post_quant_conv"})
            | {
                "quantizer.codebook": "quantize.embedding.weight",
                "quantizer.usage": Fill(1.0),  # an even share: no code is dead
                "quantizer.n_updates": Fill(0),
            }
        )

    def ignored(self, name: str) -> bool:
        return name in self.more_tensors()

    def more_tensors(self) -> dict[str, Tensor]:
        return {"quantize.codebook_used": torch.zeros(65_536)}  # the last ids that training saw

    def misfits(self, config: ImageTokenizerConfig) -> list[str]:
        expected = {"attention_sizes_px": config.level_sizes_px[-1:], "quantizer.kind": "vq"}
        return network_misfits(config) + differing(config, expected)

    def settings_of(self, config: ImageTokenizerConfig) -> dict[str, Any]:
        multiples = [width // config.stem_width for width in config.channels]
        return {
            "codebook_size": config.quantizer.codebook_size, "codebook_embed_dim": config.quantizer.code_dim,
            "codebook_l2_norm": config.quantizer.l2_normalised, "codebook_show_usage": True,
            "commit_loss_beta": config.quantizer.commitment_weight, "encoder_ch_mult": multiples,
            "decoder_ch_mult": multiples, "z_channels": config.latent_width, "ch": config.stem_width,
            "num_res_blocks": config.n_res_blocks,
        }  # fmt: skip

    def compare(self, model: ImageTokenizer, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        return compare_tokenizer(model, io, lambda x: model.quantizer.to_code(model.encoder(x)), TOLERANCE)


# ---- GPTs ------------------------------------------------------------------------------------------------------------

BLOCK: Table = {
    "attention_norm.weight": "attention_norm.weight",
    "attention.out.weight": "attention.wo.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
    "mlp.down.weight": "feed_forward.w2.weight",
}


def pairs_apart(qkv_OD: Tensor, n_heads: int) -> Tensor:
    """Rows of queries and keys from pairs side by side (their rotary positions) to halves (ours), head by head."""
    return _reordered(qkv_OD, "(n p two) d -> (n two p) d", n_heads)


def pairs_together(qkv_OD: Tensor, n_heads: int) -> Tensor:
    """The way back from `pairs_apart`."""
    return _reordered(qkv_OD, "(n two p) d -> (n p two) d", n_heads)


def _reordered(qkv_OD: Tensor, pattern: str, n_heads: int) -> Tensor:
    q, k, v = qkv_OD.chunk(3)
    return torch.cat([*(rearrange(x, pattern, n=n_heads, two=2) for x in (q, k)), v])


class LlamaGenGPT(Family):
    """What both kinds share. The grid is that of the image tokenizer."""

    kind = "gpt"
    repository = REPOSITORY
    licence = "MIT"
    project = "llamagen"
    weights_file, weights_key, settings_file = "gpt.pt", "model", "config.json"

    def condition(self, checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
        """The values of our condition."""
        raise NotImplementedError

    def condition_table(self, config: GPTConfig) -> Table:
        raise NotImplementedError

    def condition_batches(self, io: Mapping[str, Tensor], gpt: GPT) -> dict[str, tuple[ConditionBatch, ConditionBatch]]:
        """Conditions and null conditions by the ending of recorded names."""
        raise NotImplementedError

    def config(self, checkpoint: Checkpoint, options: Options) -> GPTConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        arguments = find_arguments(path, options.settings)
        n_ids, width = theirs["tok_embeddings.weight"].shape
        n_layers = count(theirs, "layers.{}.attention.wqkv.weight")
        told = {"dim": width, "n_layer": n_layers, "vocab_size": n_ids, "rope_base": 10000}
        require_same_arguments(path, told, arguments)
        vq = image_tokenizer_of(self.name, LlamaGenVQ.name, path, options, n_ids)
        self._require_grid(checkpoint, arguments, vq)
        values = {
            "transformer": {
                "width": width, "n_layers": n_layers, "n_heads": n_heads_of(path, n_layers, width, arguments),
                "norm": "rms", "norm_eps": arguments.get("norm_eps", 1e-5), "mlp": "swiglu",
                "mlp_width": theirs["layers.0.feed_forward.w1.weight"].shape[0], "bias": False, "qk_norm": False,
            },
            "layout": {"n_image_ids": n_ids, "grid_height": vq.grid_height, "grid_width": vq.grid_width},
            "condition": self.condition(checkpoint, options),
            "positions": "rotary_image",
            "image_tokenizer": read_card(options.vq)["fingerprint"],
        }  # fmt: skip
        return build_config(GPTConfig, values, str(path))

    def _require_grid(self, checkpoint: Checkpoint, arguments: Mapping[str, Any], vq: ImageTokenizerConfig) -> None:
        """Raises CheckpointError where something says that the images are of another size than the tokenizer's."""
        trained = checkpoint.rest.get("args")
        named = re.search(r"_(256|384|512)\b", checkpoint.path.stem)
        size_px = int(named[1]) if named else None
        if hasattr(trained, "image_size") and hasattr(trained, "downsample_size"):
            size_px = trained.image_size // trained.downsample_size * vq.downsample
        if "block_size" in arguments:
            size_px = round(arguments["block_size"] ** 0.5) * vq.downsample
        if size_px not in (None, vq.image_size_px):
            raise CheckpointError(f"{checkpoint.path}: for images of {size_px} px, the image tokenizer's are of "
                                  f"{vq.image_size_px} px; import that one with --image-size {size_px}")  # fmt: skip

    def table(self, config: GPTConfig) -> Table:
        n_heads = config.transformer.n_heads
        qkv = Changed(
            "attention.wqkv.weight", partial(pairs_apart, n_heads=n_heads), partial(pairs_together, n_heads=n_heads)
        )
        table: Table = {"transformer.norm.weight": "norm.weight", "head.weight": "output.weight"}
        for layer in range(config.transformer.n_layers):
            rows = BLOCK | {"attention.qkv.weight": qkv}
            table |= prefixed(f"transformer.blocks.{layer}.", f"layers.{layer}.", rows)
        return table | self.condition_table(config)

    def ignored(self, name: str) -> bool:
        return name == "freqs_cis"  # a table of positions, which old files may hold

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        image_tokenizer = {"path": str(options.vq), "fingerprint": config.image_tokenizer}
        return {"image_tokenizer": image_tokenizer, "reversed_share": 0}  # it never reads an image before a text

    def misfits(self, config: GPTConfig) -> list[str]:
        t = config.transformer
        least = 8 * t.width // 3  # which its code rounds up to a multiple
        narrow = [f"transformer.mlp_width {t.mlp_width}, below {least}"] if t.mlp_width < least else []
        expected = {
            "positions": "rotary_image", "sparsity.kind": "dense", "transformer.norm": "rms", "transformer.bias": False,
            "transformer.norm_placement": "pre", "transformer.mlp": "swiglu", "transformer.qk_norm": False,
            "layout.grid_width": config.layout.grid_height,
        }  # fmt: skip
        return differing(config, expected) + narrow

    def settings_of(self, config: GPTConfig) -> dict[str, Any]:
        t = config.transformer
        return {
            "dim": t.width, "n_layer": t.n_layers, "n_head": t.n_heads, "norm_eps": t.norm_eps, "rope_base": 10000,
            "multiple_of": t.mlp_width, "vocab_size": config.layout.n_image_ids,
            "block_size": config.sequence_layout.image_length, "cls_token_num": config.sequence_layout.prefix_length,
        }  # fmt: skip

    def compare(self, model: GPT, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Teacher-forced logits; and whether each greedy id is the likeliest after those before it."""
        tokens = io["tokens"]
        for ending, (condition, null) in self.condition_batches(io, model).items():
            for name, read in ((f"tf_logits{ending}", condition), (f"tf_logits_null{ending}", null)):
                if name in io:
                    difference = largest_difference(image_logits(model, read, tokens), io[name])
                    yield Compared(name, difference, TOLERANCE)
            for name in io:
                guidance = re.fullmatch(rf"gen_cfg([\dp]+)(?:_interval(\d+))?{ending}", name)
                if guidance:
                    drawn, scale = io[name], float(guidance[1].replace("p", "."))
                    logits, unguided = image_logits(model, condition, drawn), image_logits(model, null, drawn)
                    guided = torch.arange(drawn.shape[1]) <= int(guidance[2] or drawn.shape[1]) + 1
                    scales = torch.where(guided, scale, 1.0)[:, None]
                    yield Compared(name, n_different(torch.lerp(unguided, logits, scales).argmax(-1), drawn), 0)


def n_heads_of(path: Path, n_layers: int, width: int, arguments: Mapping[str, Any]) -> int:
    """How many heads a GPT has: by its arguments, else by its size.

    Raises:
        CheckpointError: nothing tells.
    """
    n_heads = arguments.get("n_head", N_HEADS.get((n_layers, width)))
    if n_heads is None:
        raise CheckpointError(f"{path}: {n_layers} layers of width {width} are no published size, so nothing tells the "
                              'number of heads; write {"n_head": N} into a JSON file and give it by --settings'
                              )  # fmt: skip
    return n_heads


class LlamaGenC2I(LlamaGenGPT):
    """Of one of some classes; the row after the last is the null."""

    name = "llamagen-gpt-c2i"
    unused = ("image_size_px", "text_encoder", "text")
    markers = (
        "tok_embeddings.weight", "cls_embedding.embedding_table.weight", "layers.0.attention.wqkv.weight",
        "layers.0.feed_forward.w1.weight",
    )  # fmt: skip

    def condition(self, checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
        return {"kind": "label", "n_labels": len(checkpoint.tensors["cls_embedding.embedding_table.weight"]) - 1}

    def misfits(self, config: GPTConfig) -> list[str]:
        nothing = ["condition label without labels"] if getattr(config.condition, "n_labels", 1) == 0 else []
        return super().misfits(config) + differing(config, {"condition.kind": "label"}) + nothing

    def settings_of(self, config: GPTConfig) -> dict[str, Any]:
        return super().settings_of(config) | {"model_type": "c2i", "num_classes": config.condition.n_labels}

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        n_labels = config.condition.n_labels
        examples = [str(label) for label in EXAMPLES if label < n_labels] or ["0"]
        return super().facts(config, options) | {"example_prompts": examples}

    def condition_table(self, config: GPTConfig) -> Table:
        names = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight")
        return {"embedding.weight": Joined(names, (config.layout.n_image_ids, config.condition.n_labels + 1))}

    def condition_batches(self, io: Mapping[str, Tensor], gpt: GPT) -> dict[str, tuple[ConditionBatch, ConditionBatch]]:
        labels = io["cond"]
        return {"": (labels, torch.full_like(labels, gpt.config.condition.n_labels))}


class LlamaGenT2I(LlamaGenGPT):
    """Of up to 120 features of a text by Flan-T5 XL, left-padded; the null has a vector for each of the 120 places."""

    name = "llamagen-gpt-t2i"
    unused = ("image_size_px", "text")
    markers = (
        "tok_embeddings.weight", "cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight",
        "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight",
    )  # fmt: skip

    def condition(self, checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
        n_vectors, width = checkpoint.tensors["cls_embedding.uncond_embedding"].shape
        if options.text_encoder is None:
            raise CheckpointError(f"{self.name}: reads features of texts by Flan-T5 XL; give its local folder by "
                                  "--text-encoder (config.json, its safetensors and spiece.model)")  # fmt: skip
        projection = {
            "kind": "mlp", "width": checkpoint.tensors["cls_embedding.cap_proj.fc1.weight"].shape[0], "bias": False,
        }  # fmt: skip
        return {
            "kind": "features", "n_vectors": n_vectors, "width": width, "projection": projection, "cleaning": "web",
            "encoder": fingerprint_of(options.text_encoder, width),
        }  # fmt: skip

    def misfits(self, config: GPTConfig) -> list[str]:
        expected = {"condition.kind": "features", "condition.projection.kind": "mlp",
                    "condition.projection.bias": False, "condition.projection.width": config.transformer.width,
                    "condition.n_vectors": N_FEATURES}  # fmt: skip
        return super().misfits(config) + differing(config, expected)

    def settings_of(self, config: GPTConfig) -> dict[str, Any]:
        return super().settings_of(config) | {"model_type": "t2i", "caption_dim": config.condition.width}

    def condition_table(self, config: GPTConfig) -> Table:
        return {
            "embedding.weight": "tok_embeddings.weight",
            "reader.null_vectors": "cls_embedding.uncond_embedding",
            "reader.text_shift": Fill(0.0),
            "reader.projection.0.weight": "cls_embedding.cap_proj.fc1.weight",
            "reader.projection.2.weight": "cls_embedding.cap_proj.fc2.weight",
        }

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        encoder = {"path": str(options.text_encoder), "fingerprint": config.condition.encoder}
        return super().facts(config, options) | {"text_encoder": encoder}

    def condition_batches(self, io: Mapping[str, Tensor], gpt: GPT) -> dict[str, tuple[ConditionBatch, ConditionBatch]]:
        vectors_BNC, batches = io["cond"], {}
        for ending, real_BN in (("", io["emb_masks"].bool()), ("_nomask", torch.ones_like(io["emb_masks"]).bool())):
            null_B = torch.zeros(len(vectors_BNC), dtype=torch.bool)
            batches[ending] = (
                VectorBatch(vectors_BNC, real_BN, null_B), VectorBatch(vectors_BNC, real_BN, ~null_B)
            )  # fmt: skip
        return batches
