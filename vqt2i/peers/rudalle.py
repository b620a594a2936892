"""ruDALL-E (Shonenkov et al. 2021, github.com/ai-forever/ru-dalle): GPTs of bare texts and images, with the sparse
attention of DALL·E and the norms of CogView.

A release is a bare state dict; the numbers of heads are in its authors' code, or in a `config.json` of the model's
arguments. Its image tokenizer is taming-transformers' with Gumbel quantization, its text tokenizer one of the library
youtokentome.

S text length, I image ids
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.config import build_config
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.nn.sparsity import RowColumnConfig
from vqt2i.peers.arguments import find_arguments, require_same_arguments
from vqt2i.peers.family import Compared, Family, Options, largest_difference
from vqt2i.peers.gpts import (
    TOLERANCE,
    behind_zero,
    compare_drawn,
    image_tokenizer_facts,
    image_tokenizer_of,
    require_length,
    text_tokenizer_of,
)
from vqt2i.peers.reading import Checkpoint
from vqt2i.peers.table import Changed, Mixed, Table, prefixed, with_weights
from vqt2i.peers.vqgan import count
from vqt2i.text import TextBatch

N_HEADS = {(24, 2048): 16, (12, 768): 12}  # by (layers, width): Malevich and what is trained on from it; "small"
MASKS = {"row_mask": "row", "col_mask": "column", "conv_mask": "conv"}  # of the weights, and our patterns
BLOCK = with_weights({
    "attention_norm": "input_layernorm", "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense", "attention_out_norm": "before_first_addition_layernorm",
    "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    "mlp_out_norm": "before_second_addition_layernorm",
})  # fmt: skip
# what we have one choice for
EXPECTED = {"cogview_sandwich_layernorm": True, "cogview_pb_relax": True, "mlp_activation": "gelu_jit"}


class RuDalleGPT(Family):
    """Each place that a text leaves free has an id of its own there, the last of the text ids."""

    name = "rudalle-gpt"
    kind = "gpt"
    unused = ("image_size_px", "text_encoder")
    repository = "https://github.com/ai-forever/ru-dalle"
    licence = "Apache-2.0"
    markers = (
        "text_embeddings.weight", "image_embeddings.weight", "text_pos_embeddings.weight",
        "image_row_embeddings.weight", "transformer.layers.0.before_first_addition_layernorm.weight",
        "transformer.layers.0.mlp.dense_h_to_4h.weight",
    )  # fmt: skip

    def config(self, checkpoint: Checkpoint, options: Options) -> GPTConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        arguments = find_arguments(path, options.settings)
        (n_text_ids, width), n_image_ids = (
            theirs["text_embeddings.weight"].shape,
            len(theirs["image_embeddings.weight"]),
        )
        side = len(theirs["image_row_embeddings.weight"])
        n_layers = count(theirs, "transformer.layers.{}.input_layernorm.weight")
        text_length = len(theirs["text_pos_embeddings.weight"]) - 1  # the last row is read by the code of one release
        told = {
            "num_layers": n_layers, "hidden_size": width, "vocab_size": n_text_ids, "image_vocab_size": n_image_ids,
            "text_seq_length": text_length, "image_tokens_per_dim": side,
        }  # fmt: skip
        require_same_arguments(path, told, arguments)
        for name, value in EXPECTED.items():
            if arguments.get(name, value) != value:
                raise ConfigError(f"{arguments['file']}: {name}: {arguments[name]!r}; expected {value!r}")
        n_heads = arguments.get("num_attention_heads", N_HEADS.get((n_layers, width)))
        if n_heads is None:
            raise CheckpointError(f"{path}: {n_layers} layers of width {width} are no published size, so nothing tells "
                                  'the number of heads; write {"num_attention_heads": N} into a JSON file and give it '
                                  "by --settings")  # fmt: skip
        vq = image_tokenizer_of(self.name, "taming-gumbel", path, options, n_image_ids)
        require_length(path, side * side, options, vq)
        text = text_tokenizer_of(path, options, n_text_ids - text_length)
        values = {
            "transformer": {
                "width": width, "n_layers": n_layers, "n_heads": n_heads, "norm": "layer", "norm_eps": 1e-5,
                "norm_placement": "sandwich", "mlp": "gelu_tanh", "bias": True, "qk_norm": False, "pb_relax": True,
                "mlp_width": len(theirs["transformer.layers.0.mlp.dense_h_to_4h.weight"]),
            },
            "layout": {
                "n_text_ids": n_text_ids - text_length, "n_image_ids": n_image_ids, "text_length": text_length,
                "padding": "bare", "grid_height": side, "grid_width": side,
            },
            "positions": "learned",
            "sparsity": {"kind": "row_column", "conv_wraps": self._conv_wraps(checkpoint, n_layers, text_length, side)},
            "head": {"norm": True, "bias": True},
            "text_tokenizer": text.fingerprint,
            "image_tokenizer": read_card(options.vq)["fingerprint"],
        }  # fmt: skip
        return build_config(GPTConfig, values, str(path))

    def _conv_wraps(self, checkpoint: Checkpoint, n_layers: int, text_length: int, side: int) -> bool:
        """Whether convolutions go on around the sides of the grid, as masks among the weights say.

        Raises:
            CheckpointError: they are none of ours.
        """
        masks = {ours: checkpoint.tensors.get(f"transformer.{name}") for name, ours in MASKS.items()}
        found = {name: mask[text_length:, text_length:].bool() for name, mask in masks.items() if mask is not None}
        for wraps in (False, True):
            ours = RowColumnConfig(conv_wraps=wraps)
            expected = {name: torch.from_numpy(ours.visible(name, side, side)) for name in found}
            if ours.patterns(n_layers) == patterns(n_layers) and all(
                map(torch.equal, found.values(), expected.values())
            ):
                return wraps
        raise CheckpointError(f"{checkpoint.path}: its masks ({', '.join(MASKS)}) over {n_layers} layers are not those "
                              "of a published ruDALL-E")  # fmt: skip

    def table(self, config: GPTConfig) -> Table:
        layout = config.layout
        sizes = (layout.n_text_ids, layout.text_length)

        def with_pads_last(text_VD: Tensor, image_VD: Tensor) -> Tensor:
            ids_VD, pads_SD = text_VD.split(sizes)
            return torch.cat((ids_VD, image_VD, pads_SD))

        def with_pads_in_text(rows_VD: Tensor) -> tuple[Tensor, Tensor]:
            ids_VD, image_VD, pads_SD = rows_VD.split((sizes[0], layout.n_image_ids, sizes[1]))
            return torch.cat((ids_VD, pads_SD)), image_VD

        def without_pads(rows: Tensor) -> Tensor:
            return torch.cat((rows[: sizes[0]], rows[sum(sizes) :]))

        def with_zeros_for_pads(rows: Tensor) -> Tensor:
            return torch.cat((rows[: sizes[0]], rows.new_zeros(sizes[1], *rows.shape[1:]), rows[sizes[0] :]))

        def from_first(rows_SD: Tensor) -> Tensor:
            return torch.cat((torch.zeros_like(rows_SD[:1]), rows_SD[:-1]))

        def to_first(rows_SD: Tensor) -> Tensor:
            return torch.cat((rows_SD[1:], torch.zeros_like(rows_SD[:1])))

        table: Table = {
            "embedding.weight": Mixed(
                ("text_embeddings.weight", "image_embeddings.weight"), with_pads_last, with_pads_in_text
            ),
            "position_embeddings.0.weight": Changed("text_pos_embeddings.weight", from_first, to_first),
            "position_embeddings.1.weight": behind_zero("image_row_embeddings.weight"),
            "position_embeddings.2.weight": behind_zero("image_col_embeddings.weight"),
            "head.weight": Changed("to_logits.1.weight", without_pads, with_zeros_for_pads),
            "head.bias": Changed("to_logits.1.bias", without_pads, with_zeros_for_pads),
        } | with_weights({"head.norm": "to_logits.0", "transformer.norm": "transformer.final_layernorm"})
        for layer in range(config.transformer.n_layers):
            table |= prefixed(f"transformer.blocks.{layer}.", f"transformer.layers.{layer}.", BLOCK)
        return table

    def ignored(self, name: str) -> bool:
        return name.removeprefix("transformer.") in MASKS

    def facts(self, config: GPTConfig, options: Options) -> dict[str, Any]:
        return image_tokenizer_facts(config, options) | {"reversed_share": 0.0}

    def files(self, checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
        return text_tokenizer_of(checkpoint.path, options).files

    def compare(self, model: GPT, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Logits of text and image, but those of padding, which are never drawn, and greedy ids."""
        layout = model.layout
        n, length = layout.config.n_text_ids, layout.config.text_length
        ids_BS, image_BI = io["input_ids"].split((length, layout.image_length), dim=1)
        text = TextBatch(ids_BS, (ids_BS != 0).sum(1))
        with torch.inference_mode():
            hidden = model(layout.join(text, image_BI))
            found = {"text": model.text_logits(hidden), "image": model.image_logits(hidden)}
        expected = {"text": io["tf_logits"][..., :n], "image": io["tf_logits"][..., n + length :]}
        for part, logits in found.items():
            yield Compared(f"tf_logits of {part}", largest_difference(logits, expected[part]), TOLERANCE)
        yield from compare_drawn(model, text, io)


def patterns(n_layers: int) -> list[str]:
    """Which of its masks each layer has there."""
    return ["column" if i % 4 == 1 else "conv" if i == n_layers - 1 else "row" for i in range(n_layers)]
