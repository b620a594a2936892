"""CogView (Ding et al. 2021, arXiv 2105.13290): its VQ-VAE, and its GPTs of texts and images.

All ids are in one space there: image ids, text ids, 27 marks, and rows that fill up to a multiple of 128. [BASE] tells
the size of an image's grid. As its code draws (generate_samples.py, generation/magnify.py), with our names:

    text to image       [ROI1] text [BASE] [BOI1] image [EOI1]                      T2I text EOT BOI image I2T
    captions            [BASE] [BOI1] image [EOI1] [ROI1] text                      EOT BOI image I2T BOT text
    super-resolution    [ROI1] text [BASE] [BOI1] half [EOI1] [ROI2] [POS0] [BASE] [BOI2] image

C channels, K codes, V ids
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.config import build_config
from vqt2i.data.images import to_tensor
from vqt2i.errors import CheckpointError
from vqt2i.gpt import (
    GPT,
    ConditionConfig,
    GPTConfig,
    LowResolutionBatch,
    LowResolutionCondition,
    Sequences,
    TextCondition,
)
from vqt2i.peers.arguments import find_arguments, require_same_arguments
from vqt2i.peers.family import Compared, Family, Options, largest_difference, n_different
from vqt2i.peers.gpts import (
    TOLERANCE,
    image_logits,
    image_tokenizer_facts,
    image_tokenizer_of,
    text_tokenizer_of,
)
from vqt2i.peers.parallel import Split, read_parts
from vqt2i.peers.reading import Checkpoint, read_checkpoint
from vqt2i.peers.table import Changed, Fill, Mixed, Table, prefixed, with_weights
from vqt2i.peers.vqgan import count
from vqt2i.text import TextBatch, pad_texts
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

REPOSITORY = "https://github.com/THUDM/CogView"
IMAGE_SIZE_PX = 256

# ---- image tokenizer -------------------------------------------------------------------------------------------------

MEAN, STD = (0.79093, 0.76271, 0.75340), (0.30379, 0.32279, 0.32800)  # of the pixels that it was trained on, in [0, 1]


class CogViewVQ(Family):
    """Strided convolutions and ReLU, codes that are running means. Pixels are normalised by channel there."""

    name = "cogview-vq"
    kind = "vqgan"
    unused = ("settings", "vq", "text_encoder", "text")
    repository = REPOSITORY
    licence = "Apache-2.0"
    markers = ("enc_b.blocks.0.weight", "quantize_t.embed", "dec.blocks.0.weight")

    def read(self, path: Path) -> Checkpoint:
        """As `Family.read`; names without the `module.` that parallel training puts before them."""
        checkpoint = super().read(path)
        plain = {name.removeprefix("module."): tensor for name, tensor in checkpoint.tensors.items()}
        return checkpoint._replace(tensors=plain)

    def config(self, checkpoint: Checkpoint, options: Options) -> ImageTokenizerConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        n_levels = count(theirs, "enc_b.blocks.{}.weight", step=2) - 1  # behind a ReLU each, the projection last
        channels = [theirs[f"enc_b.blocks.{2 * level}.weight"].shape[0] for level in range(n_levels)]
        code_dim, n_codes = theirs["quantize_t.embed"].shape
        quantizer = {
            "kind": "vq", "codebook_size": n_codes, "code_dim": code_dim, "l2_normalised": False, "update": "ema",
            "commitment_weight": 0.25, "usage_decay": 0.99, "restart_below": 0,
        }  # fmt: skip
        values = {
            "image_size_px": options.image_size_px or IMAGE_SIZE_PX, "downsample": 2**n_levels,
            "architecture": "strided", "patch_px": 2, "channels": channels, "latent_channels": code_dim,
            "n_res_blocks": 0, "quantizer": quantizer,
        }  # fmt: skip
        return build_config(ImageTokenizerConfig, values, str(path))

    def table(self, config: ImageTokenizerConfig) -> Table:
        n_levels, code_dim = len(config.channels), config.quantizer.code_dim
        mean_C, std_C = torch.tensor(MEAN), torch.tensor(STD)

        def to_unit(weight: Tensor) -> Tensor:  # from normalised pixels to [-1, 1]
            return weight * (2 * std_C.to(weight)).view(3, *[1] * (weight.ndim - 1))

        def from_unit(weight: Tensor) -> Tensor:
            return weight / (2 * std_C.to(weight)).view(3, *[1] * (weight.ndim - 1))

        shift_C = 2 * mean_C - 1
        last = f"dec.blocks.{2 * n_levels}"
        table: Table = {
            "encoder.pixel_mean": Mixed((), lambda: shift_C.to(torch.empty(0).device)),
            "encoder.pixel_std": Mixed((), lambda: (2 * std_C).to(torch.empty(0).device)),
            "decoder.conv_out.weight": Changed(f"{last}.weight", to_unit, from_unit),
            "decoder.conv_out.bias": Changed(
                f"{last}.bias", lambda b: to_unit(b) + shift_C.to(b), lambda b: from_unit(b - shift_C.to(b))
            ),
            "quantizer.codebook": Changed("quantize_t.embed", lambda embed: embed.T, lambda codes: codes.T),
            # in ours the sums that the means are made of, in the unit of an even share
            "quantizer.latent_sums": Mixed(("quantize_t.embed",), lambda embed: embed.T),
            "quantizer.usage": Fill(1.0),
            "quantizer.n_updates": Fill(0),
            "quantizer.from_code.weight": Mixed((), lambda: torch.eye(code_dim)[..., None, None]),
            "quantizer.from_code.bias": Fill(0.0),
        } | with_weights({"quantizer.to_code": f"enc_b.blocks.{2 * n_levels}"})
        for level in range(n_levels):
            parts = {f"encoder.layers.{level}": f"enc_b.blocks.{2 * level}"}
            table |= with_weights(parts | {f"decoder.layers.{level}": f"dec.blocks.{2 * level}"})
        return table

    def ignored(self, name: str) -> bool:
        return name in ("quantize_t.cluster_size", "quantize_t.embed_avg")  # of its training

    def compare(self, model: ImageTokenizer, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Latents, ids and pictures of bytes."""
        images = to_tensor(io["x_uint8"].movedim(1, -1))
        with torch.inference_mode():
            latents = model.quantizer.to_code(model.encoder(images)).movedim(1, -1)
            yield Compared("z", largest_difference(latents, io["z"]), TOLERANCE)
            ids_BHW = io["indices"].unflatten(1, latents.shape[1:3])
            yield Compared("indices", n_different(model.encode(images), ids_BHW), 0)
            pictures = (model.decoder(model.quantizer.decode(ids_BHW)) + 1) / 2
            yield Compared("rec", largest_difference(pictures, io["rec"]), TOLERANCE)


# ---- GPT -------------------------------------------------------------------------------------------------------------

MARKS = ("PAD", "BOI1", "BOI2", "BOI3", "EOI1", "EOI2", "EOI3", "ROI1", "ROI2", "ROI3", "SEP", "MASK", "CLS", "ENC",
         "TINY", "SMALL", "BASE", "BIG", *(f"POS{i}" for i in range(9)))  # fmt: skip
SIZES = {8: "TINY", 16: "SMALL", 32: "BASE", 64: "BIG"}  # of a grid, by its side
OURS = ("PAD", "ROI1", "EOI1", "BOI1", "ROI1")  # what stands for PAD, T2I, I2T, BOI and BOT
SECOND = ("ROI2", "POS0", "BOI2")  # and for the marks of a second image
ROWS = 128  # the vocabulary is filled up to a multiple
N_HEADS = {(48, 2560): 40, (12, 1024): 16}  # by (layers, width), as in its scripts
# LayerNorms there divide by an eighth of the largest number, ours by the largest
NORM_EPS = 1e-5 / 64
BLOCK = with_weights({
    "attention_norm": "input_layernorm", "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense", "attention_out_norm": "third_layernorm",
    "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    "mlp_out_norm": "fourth_layernorm",
})  # fmt: skip
EMBEDDINGS, POSITIONS = "word_embeddings.weight", "transformer.position_embeddings.weight"
# of a model in parts (mpu/layers.py): matrices that are divided by what comes out, or by what goes in
DIVIDED = {
    EMBEDDINGS: Split(0), ".query_key_value.weight": Split(0, 3), ".query_key_value.bias": Split(0, 3),
    ".dense_h_to_4h.weight": Split(0), ".dense_h_to_4h.bias": Split(0), ".attention.dense.weight": Split(1),
    ".dense_4h_to_h.weight": Split(1),
}  # fmt: skip


def split_of(name: str) -> Split | None:
    """How a tensor is divided among parts, as `SplitOf`."""
    return next((split for ending, split in DIVIDED.items() if name.endswith(ending)), None)


class CogViewGPT(Family):
    """Text to image. Its matrix of embeddings is that of the head too; ours are two, which begin alike.

    condition: what its images are drawn from.
    """

    name = "cogview-gpt"
    kind = "gpt"
    unused = ("image_size_px", "text_encoder")
    condition: ClassVar[ConditionConfig] = TextCondition()
    repository = REPOSITORY
    licence = "Apache-2.0"
    markers = (
        EMBEDDINGS, POSITIONS, "transformer.layers.0.third_layernorm.weight",
        "transformer.layers.0.mlp.dense_h_to_4h.weight",
    )  # fmt: skip

    def read(self, path: Path) -> Checkpoint:
        """The file, or in the folder of a checkpoint all parts that there are."""
        return read_parts(path, split_of) if path.is_dir() else read_checkpoint(path)

    def config(self, checkpoint: Checkpoint, options: Options) -> GPTConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        arguments = find_arguments(path, options.settings)
        (n_rows, width), n_positions = theirs[EMBEDDINGS].shape, len(theirs[POSITIONS])
        n_layers = count(theirs, "transformer.layers.{}.input_layernorm.weight")
        qkv = theirs.get("transformer.layers.0.attention.query_key_value.weight")
        if qkv is not None and len(qkv) < 3 * width:
            raise CheckpointError(f"{path}: one of {3 * width // max(1, len(qkv))} parts of a model; give the folder "
                                  "with all of them")  # fmt: skip
        told = {"num_layers": n_layers, "hidden_size": width, "max_position_embeddings": n_positions}
        require_same_arguments(path, told, arguments)
        n_heads = arguments.get("num_attention_heads", N_HEADS.get((n_layers, width)))
        if n_heads is None:
            raise CheckpointError(f"{path}: {n_layers} layers of width {width} are no published size, so nothing tells "
                                  'the number of heads; write {"num_attention_heads": N} into a JSON file and give it '
                                  "by --settings")  # fmt: skip
        vq = image_tokenizer_of(self.name, CogViewVQ.name, path, options, arguments.get("img_num_tokens"))
        text = text_tokenizer_of(path, options, arguments.get("txt_num_tokens"))
        n_text_ids = arguments.get("txt_num_tokens", text.n_ids)
        n_ids = vq.vocab_size + n_text_ids + len(MARKS)
        text_length = n_positions - 4 - vq.n_image_ids  # beside all marks
        if not n_ids <= n_rows < n_ids + 8 * ROWS:
            raise CheckpointError(f"{path}: has {n_rows:,} ids; {options.vq}, {options.text} and {len(MARKS)} marks "
                                  f"have {n_ids:,}; give the tokenizers of the model")  # fmt: skip
        if text_length < 1 or vq.grid_height not in SIZES:
            raise CheckpointError(f"{path}: has {n_positions:,} positions, too few for images of {vq.n_image_ids:,} "
                                  f"ids as those of {options.vq}; import that one with another --image-size"
                                  )  # fmt: skip
        values = {
            "transformer": {
                "width": width, "n_layers": n_layers, "n_heads": n_heads, "norm": "scaled_layer", "norm_eps": NORM_EPS,
                "norm_placement": "sandwich", "mlp": "gelu_tanh", "bias": True, "qk_norm": False,
                "mlp_width": len(theirs["transformer.layers.0.mlp.dense_h_to_4h.weight"]),
            },
            "layout": {
                "n_text_ids": n_text_ids, "n_image_ids": vq.vocab_size, "text_length": text_length,
                "grid_height": vq.grid_height, "grid_width": vq.grid_width, "image_marks": "paired",
            },
            "condition": self.condition.model_dump(),
            "positions": "sequence",
            "text_tokenizer": text.fingerprint,
            "image_tokenizer": read_card(options.vq)["fingerprint"],
        }  # fmt: skip
        return build_config(GPTConfig, values, str(path))

    def table(self, config: GPTConfig) -> Table:
        scored, marks = their_ids(config)
        rows_V = torch.tensor([*scored, *marks])
        layout = config.sequence_layout
        n_positions = layout.config.text_length + 4 + layout.image_length

        def to_theirs(rows_VD: Tensor) -> tuple[Tensor]:
            n_ids = config.layout.n_text_ids + config.layout.n_image_ids + len(MARKS)
            full_VD = rows_VD.new_zeros(-(-n_ids // ROWS) * ROWS, rows_VD.shape[1])
            full_VD[rows_V] = rows_VD
            return (full_VD,)

        table: Table = {
            "embedding.weight": Mixed((EMBEDDINGS,), lambda rows: rows[rows_V.to(rows.device)], to_theirs),
            "head.weight": Mixed((EMBEDDINGS,), lambda rows: rows[rows_V[: len(scored)].to(rows.device)]),
            "position_embeddings.0.weight": Changed(
                POSITIONS,
                lambda rows: rows[: layout.n_sequence_positions],  # of two images, counted anew, fewer
                lambda rows: F.pad(rows, (0, 0, 0, n_positions - len(rows))),
            ),
        } | with_weights({"transformer.norm": "transformer.final_layernorm"})
        for layer in range(config.transformer.n_layers):
            table |= prefixed(f"transformer.blocks.{layer}.", f"transformer.layers.{layer}.", BLOCK)
        return table

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        return image_tokenizer_facts(config, options) | {"reversed_share": 0.0}

    def files(self, checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
        return text_tokenizer_of(checkpoint.path, options).files

    def compare(self, model: GPT, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Logits of the ids that ours has, with causal attention and with five that see each other; greedy ids."""
        scored, _ = their_ids(model.config)

        def read(row: Tensor) -> Sequences:
            return as_ours(model, row.tolist())

        @torch.inference_mode()
        def logits(sequences: Sequences, n_whole: int = 0) -> Tensor:
            x_BLD, cos_sin = model.embed(sequences)
            mask = sequences.causal_mask()
            mask[..., :n_whole] = True
            hidden = model.transformer(x_BLD, mask_B1LK=mask, causal=not n_whole, cos_sin=cos_sin)
            return model.head(hidden, slice(None))[0]

        found = [logits(read(row)) for row in io["tf_tokens"]]
        differences = [
            largest_difference(ours, theirs[: len(ours)][:, scored])
            for ours, theirs in zip(found, io["tf_logits"], strict=True)
        ]
        yield Compared("tf_logits", max(differences), TOLERANCE)
        whole = logits(read(io["tf_tokens"][0]), n_whole=5)
        expected = io["tf_logits_sep5_row0"][0, : len(whole)][:, scored]
        yield Compared("tf_logits_sep5_row0", largest_difference(whole, expected), TOLERANCE)
        text, image_1I = parts_of(model, io["gen_tokens"].tolist(), model.layout.image_length)
        drawn = image_logits(model, text, image_1I)[0]
        n_image_ids = model.config.layout.n_image_ids
        yield Compared("gen_logits", largest_difference(drawn, io["gen_logits"][:, :n_image_ids]), TOLERANCE)
        yield Compared("gen_tokens", n_different(drawn.argmax(-1), image_1I[0]), 0)


class CogViewCaption(CogViewGPT):
    """Fine-tuned for texts of images, which are scores of images for texts too. Nothing ends its texts."""

    name = "cogview-caption"

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        return image_tokenizer_facts(config, options)


class CogViewSR(CogViewGPT):
    """Fine-tuned to draw a quarter of an image in twice its height and width."""

    name = "cogview-sr"
    kind = "upscaler"
    condition = LowResolutionCondition()

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        return image_tokenizer_facts(config, options)

    def compare(self, model: GPT, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Logits and greedy ids of a second image."""
        ids, n_low = io["roi2_tokens"].tolist(), model.layout.low_length
        text, low_1M = parts_of(model, ids, n_low)
        image_1I = torch.tensor([ids[-len(io["roi2_logits"]) :]])
        drawn = image_logits(model, LowResolutionBatch(text, low_1M), image_1I)[0]
        expected = io["roi2_logits"][:, : model.layout.config.n_image_ids]
        yield Compared("roi2_logits", largest_difference(drawn, expected), TOLERANCE)
        yield Compared("roi2_tokens", n_different(drawn.argmax(-1), image_1I[0]), 0)


def their_ids(config: GPTConfig) -> tuple[list[int], list[int]]:
    """Which of their ids each of ours is: of those that are scored, and of the marks behind them."""
    n_image, n_text = config.layout.n_image_ids, config.layout.n_text_ids
    mark = {name: n_image + n_text + i for i, name in enumerate(MARKS)}
    scored = [*range(n_image, n_image + n_text), mark[SIZES[config.layout.grid_height]], *range(n_image)]
    return scored, [mark[name] for name in (*OURS, *(SECOND if config.sequence_layout.counts_anew else ()))]


def parts_of(gpt: GPT, ids: list[int], n: int) -> tuple[TextBatch, Tensor]:
    """A text, and the `n` ids of the image behind it, in their ids."""
    layout = gpt.layout.config
    scored, _ = their_ids(gpt.config)
    end = ids.index(scored[layout.n_text_ids])
    text = [i - layout.n_image_ids for i in ids[1:end]]
    return pad_texts([text], max(1, len(text))), torch.tensor([ids[end + 2 : end + 2 + n]])


def as_ours(gpt: GPT, ids: list[int]) -> Sequences:
    """Their ids of a text and an image as our sequence, without padding."""
    return gpt.layout.join(*parts_of(gpt, ids, gpt.layout.image_length))
