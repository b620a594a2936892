"""CLIPs (Radford et al. 2021, arXiv 2103.00020): as OpenAI, open_clip and `transformers` publish them, and back.

OpenAI's and open_clip's files have the same names. What weights do not tell, open_clip has in `open_clip_config.json`,
`transformers` in `config.json`; OpenAI's models all have heads 64 wide and quick GELU.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vqt2i.clip import CLIP, CLIPConfig
from vqt2i.clip.model import MAX_LOGIT_SCALE, ClassReadout, EndReadout
from vqt2i.config import build_config
from vqt2i.data.images import to_tensor
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.peers.family import Compared, Family, Options, differing, largest_difference
from vqt2i.peers.reading import Checkpoint, read_checkpoint
from vqt2i.peers.table import Changed, Row, Table, prefixed, with_weights
from vqt2i.peers.torchscript import is_torchscript, read_torchscript
from vqt2i.peers.vqgan import count
from vqt2i.runtime import say
from vqt2i.text.huggingface import FORMS, HuggingFaceTokenizer, find_clip_tokenizer, load_own_tokenizer

FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PREPROCESSOR, OPEN_CLIP_SETTINGS = "preprocessor_config.json", "open_clip_config.json"
OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")  # numbers that lie among the weights there
UNKNOWN = "unknown"  # in place of a tokenizer's fingerprint
ACTIVATIONS = {"quick_gelu": "gelu_quick", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
COMMON = {"norm": "layer", "bias": True, "qk_norm": False}
TOLERANCE = 1e-4
# settings of open_clip that we have a choice for, or that do nothing when a model is read
OPEN_CLIP_KNOWN = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
OPEN_CLIP_PLAIN = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",)}  # what others are when they change nothing


class Tower(NamedTuple):
    """What the weights of a tower do not tell."""

    n_heads: int
    activation: str
    norm_eps: float = 1e-5


class Settings(NamedTuple):
    """What weights do not tell. marks: ids before and behind a text. mean, std: of pixels in [0, 1], CLIP's own."""

    vision: Tower
    text: Tower
    marks: tuple[int, int]
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


class Layout(NamedTuple):
    """How a publisher names the weights. blocks: patterns of a block's names in both towers, the images' first.

    transposed: whether projections are (inputs, outputs).
    """

    licence: str
    names: Mapping[str, str]
    modules: Mapping[str, str]
    blocks: tuple[str, str]
    block: Table
    transposed: bool

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.names.values(), self.up(0), self.up(1))

    def up(self, tower: int, layer: str = "0") -> str:
        """The name of the first matrix of a block's MLP, (its width, that of the tower)."""
        return self.blocks[tower].format(layer) + str(self.block["mlp.up.weight"])


OPENAI = Layout(
    licence="MIT",
    names={
        "class_token": "visual.class_embedding",
        "patch_positions": "visual.positional_embedding",
        "patch_embedding.weight": "visual.conv1.weight",
        "vision_projection.weight": "visual.proj",
        "text_embedding.weight": "token_embedding.weight",
        "text_positions": "positional_embedding",
        "text_projection.weight": "text_projection",
        "logit_scale.log": "logit_scale",
    },
    modules={"patch_norm": "visual.ln_pre", "vision.norm": "visual.ln_post", "text.norm": "ln_final"},
    blocks=("visual.transformer.resblocks.{}.", "transformer.resblocks.{}."),
    block=with_weights({
        "attention_norm": "ln_1", "attention.out": "attn.out_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }) | {f"attention.qkv.{kind}": f"attn.in_proj_{kind}" for kind in ("weight", "bias")},
    transposed=True,
)  # fmt: skip
HUGGING_FACE = Layout(
    licence="unknown",  # that of whoever trained the weights
    names={
        "class_token": "vision_model.embeddings.class_embedding",
        "patch_positions": "vision_model.embeddings.position_embedding.weight",
        "patch_embedding.weight": "vision_model.embeddings.patch_embedding.weight",
        "vision_projection.weight": "visual_projection.weight",
        "text_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text_positions": "text_model.embeddings.position_embedding.weight",
        "text_projection.weight": "text_projection.weight",
        "logit_scale.log": "logit_scale",
    },
    modules={
        "patch_norm": "vision_model.pre_layrnorm", "vision.norm": "vision_model.post_layernorm",
        "text.norm": "text_model.final_layer_norm",
    },
    blocks=("vision_model.encoder.layers.{}.", "text_model.encoder.layers.{}."),
    block=with_weights({
        "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
        "attention.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"), "attention.out": "self_attn.out_proj",
    }),
    transposed=False,
)  # fmt: skip


class CLIPFamily(Family):
    """Any of the layouts; models are exported in that of `transformers`.

    is_openai: whether heads are 64 wide and GELU is quick, as in OpenAI's, where nothing says so.
    """

    name = "clip"
    is_openai: ClassVar[bool] = False
    kind = "clip"
    repository = "https://github.com/openai/CLIP"
    markers = OPENAI.markers
    unused = ("image_size_px", "vq", "text_encoder")
    project, weights_file, settings_file = "hf-clip", "model.safetensors", "config.json"

    def __init__(self, layout: Layout = HUGGING_FACE) -> None:
        self.layout, self.licence = layout, layout.licence

    def read(self, path: Path) -> Checkpoint:
        """The weights in a file, of a TorchScript archive too, or in the folder of a model as it is published."""
        if path.is_dir():
            found = next((path / name for name in FILES if (path / name).is_file()), None)
            if found is None:
                raise CheckpointError(f"{path}: expected a file with weights, or one of {', '.join(FILES)} in a folder")
            path = found
        if path.is_file() and is_torchscript(path):
            return Checkpoint(path, read_torchscript(path), {})
        return read_checkpoint(path)

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        return any(set(layout.markers) <= tensors.keys() for layout in (OPENAI, HUGGING_FACE))

    def of(self, checkpoint: Checkpoint, options: Options) -> "CLIPFamily":
        return type(self)(OPENAI if OPENAI.names["class_token"] in checkpoint.tensors else HUGGING_FACE)

    def config(self, checkpoint: Checkpoint, options: Options) -> CLIPConfig:
        try:
            return self._config(checkpoint, options)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{checkpoint.path}: weights or settings unlike those of a CLIP ({error})") from error

    def _config(self, checkpoint: Checkpoint, options: Options) -> CLIPConfig:
        theirs, path, layout = checkpoint.tensors, checkpoint.path, self.layout
        if layout is OPENAI:
            settings = _openai_settings(checkpoint, options, is_openai=self.is_openai)
        else:
            settings = _hugging_face_settings(checkpoint, options)
        shapes = {ours: tuple(theirs[name].shape) for ours, name in layout.names.items()}
        tokenizer = _find_tokenizer(checkpoint, options)
        if tokenizer and (tokenizer.start, tokenizer.end) != settings.marks:
            marks, others = " and ".join(map(str, settings.marks)), f"{tokenizer.start} and {tokenizer.end}"
            raise CheckpointError(f"{path}: texts are marked by the ids {marks}, by its tokenizer with {others}; "
                                  "give its own by --text")  # fmt: skip
        n_patches, patch_size_px = shapes["patch_positions"][0] - 1, shapes["patch_embedding.weight"][-1]
        if math.isqrt(n_patches) ** 2 != n_patches:
            raise CheckpointError(f"{path}: {n_patches} patches of an image, which are no square; expected one")
        values = {
            "image_size_px": math.isqrt(n_patches) * patch_size_px,
            "patch_size_px": patch_size_px,
            "text_length": shapes["text_positions"][0] - 2,
            "n_text_ids": shapes["text_embedding.weight"][0],
            "vision": _tower(checkpoint, layout, 0, settings.vision),
            "text": _tower(checkpoint, layout, 1, settings.text),
            "embedding_width": shapes["text_projection.weight"][1 if layout.transposed else 0],
            "text_tokenizer": tokenizer.fingerprint if tokenizer else UNKNOWN,
            "image_readout": ClassReadout(),
            "text_readout": EndReadout(start_id=settings.marks[0], end_id=settings.marks[1]),
            "pixel_mean": settings.mean,
            "pixel_std": settings.std,
        }
        return build_config(CLIPConfig, values, str(path))

    def table(self, config: CLIPConfig) -> Table:
        rows: Table = {ours: self._row(ours, name) for ours, name in self.layout.names.items()}
        rows |= with_weights(self.layout.modules)
        for tower, (part, n_layers) in enumerate((("vision", config.vision.n_layers), ("text", config.text.n_layers))):
            for layer in range(n_layers):
                theirs = self.layout.blocks[tower].format(layer)
                rows |= prefixed(f"{part}.blocks.{layer}.", theirs, self.layout.block)
        return rows

    def _row(self, ours: str, name: str) -> Row:
        if ours == "patch_embedding.weight":  # a convolution: (D, 3, p, p) and back
            return Changed(name, lambda w: w.flatten(1), lambda w: w.unflatten(1, (3, math.isqrt(w.shape[1] // 3), -1)))
        if ours == "logit_scale.log":
            bounded = (0, math.log(MAX_LOGIT_SCALE))  # as it is used here; others use it as it is
            return Changed(name, lambda log: log.reshape(1), lambda log: log.clamp(*bounded).reshape(()))
        if ours.endswith("projection.weight") and self.layout.transposed:
            return Changed(name, lambda w: w.T, lambda w: w.T)
        return name

    def ignored(self, name: str) -> bool:
        # 0, 1, 2 …, which old versions of `transformers` write
        return name.endswith(".position_ids") if self.layout is HUGGING_FACE else name in OPENAI_ONLY

    def files(self, checkpoint: Checkpoint, options: Options) -> dict[str, bytes]:
        tokenizer = _find_tokenizer(checkpoint, options)
        if tokenizer is None:
            say(f"{checkpoint.path}: no tokenizer beside it, so that no prompts can be read; give its own by --text "
                f"({FORMS})")  # fmt: skip
        return tokenizer.files if tokenizer else {}

    def misfits(self, config: CLIPConfig) -> list[str]:
        expected = {"image_readout.kind": "class", "text_readout.kind": "end"} | {
            f"{tower}.{name}": value for tower in ("vision", "text")
            for name, value in {**COMMON, "norm_placement": "pre", "pb_relax": False}.items()
        }  # fmt: skip
        swiglu = [f"{tower}.mlp swiglu" for tower in ("vision", "text") if getattr(config, tower).mlp == "swiglu"]
        found = differing(config, expected) + swiglu
        if not found and config.text_readout.end_id == 2 and config.n_text_ids > 3:
            found.append("text_readout.end_id 2, which stands for the highest id there")
        return found

    def settings_of(self, config: CLIPConfig) -> dict[str, Any]:
        marks = config.text_readout
        text = {"vocab_size": config.n_text_ids, "max_position_embeddings": config.text_length + 2,
                "bos_token_id": marks.start_id, "eos_token_id": marks.end_id, "pad_token_id": marks.end_id}  # fmt: skip
        vision = {"image_size": config.image_size_px, "patch_size": config.patch_size_px}
        common = {"projection_dim": config.embedding_width}
        return {
            "architectures": ["CLIPModel"], "model_type": "clip", **common,
            "vision_config": common | _tower_settings(config.vision) | vision,
            "text_config": common | _tower_settings(config.text) | text,
        }  # fmt: skip

    def more_files(self, config: CLIPConfig, folder: Path) -> dict[str, bytes]:
        side, tokenizer = config.image_size_px, load_own_tokenizer(folder)
        pixels = {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,  # bicubic
            "do_center_crop": True, "crop_size": {"height": side, "width": side},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": config.pixel_mean, "image_std": config.pixel_std,
        }  # fmt: skip
        return {PREPROCESSOR: json.dumps(pixels, indent=1).encode()} | (tokenizer.files if tokenizer else {})

    def compare(self, model: CLIP, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        """Embeddings of `pixels_uint8` and of `token_ids`, which have their marks, and the scaled similarities."""
        ids_BL = io["token_ids"]
        n_ids_B = (ids_BL == model.config.text_readout.end_id).long().argmax(1) - 1
        with torch.inference_mode():
            image_BE = model.encode_image(to_tensor(io["pixels_uint8"].movedim(1, -1)))
            text_BE = model.encode_text(ids_BL[:, 1:-1], n_ids_B)
            logits_BB = model.logit_scale() * image_BE @ text_BE.T
        found = {"image_embeds": image_BE, "text_embeds": text_BE, "logits_per_image": logits_BB}
        for name, value in found.items():
            yield Compared(name, largest_difference(value, io[name]), TOLERANCE)


def _tower_settings(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width, "intermediate_size": config.mlp_width, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "hidden_act": NAMES[config.mlp], "layer_norm_eps": config.norm_eps,
    }  # fmt: skip


def _tower(checkpoint: Checkpoint, layout: Layout, tower: int, settings: Tower) -> TransformerConfig:
    theirs = checkpoint.tensors
    mlp_width, width = theirs[layout.up(tower)].shape
    values = {
        "width": width, "n_layers": count(theirs, layout.up(tower, "{}")), "mlp_width": mlp_width,
        "n_heads": settings.n_heads, "mlp": settings.activation, "norm_eps": settings.norm_eps,
    }  # fmt: skip
    return build_config(TransformerConfig, values | COMMON, f"{checkpoint.path}: {('images', 'texts')[tower]}")


def _n_heads(width: int, head_width: int) -> int:
    if width % head_width:
        raise ValueError(f"a tower {width} wide is no multiple of its heads' {head_width}")
    return width // head_width


def _find_tokenizer(checkpoint: Checkpoint, options: Options) -> HuggingFaceTokenizer | None:
    found = find_clip_tokenizer(options.text or checkpoint.path.parent)
    if found is None and options.text:
        raise CheckpointError(f"{options.text}: no tokenizer in it; expected {FORMS}")
    return found


def _openai_settings(checkpoint: Checkpoint, options: Options, *, is_openai: bool) -> Settings:
    """Of an OpenAI model, or by open_clip's file."""
    theirs, path = checkpoint.tensors, checkpoint.path
    n_ids, width = theirs[OPENAI.names["text_embedding.weight"]].shape
    vision_width = theirs[OPENAI.names["class_token"]].shape[0]
    marks = n_ids - 2, n_ids - 1  # the end is found as the highest id
    file = options.settings or path.parent / OPEN_CLIP_SETTINGS
    if options.settings is None and not file.is_file():
        if not is_openai and not set(OPENAI_ONLY) <= theirs.keys():
            raise CheckpointError(f"{path}: nothing says how wide its heads are and which GELU it has, for there is no "
                                  f"{OPEN_CLIP_SETTINGS} beside it and no {OPENAI_ONLY[0]} in it, as OpenAI's have; "
                                  "give the former by --settings")  # fmt: skip
        return Settings(*(Tower(_n_heads(w, 64), "gelu_quick") for w in (vision_width, width)), marks)
    read = _read_json(file)
    model, pixels = read.get("model_cfg", read), read.get("preprocess_cfg", {})
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise CheckpointError(f"{file}: expected settings of open_clip, with vision_cfg and text_cfg")
    for part, values in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        for name, value in values.items():
            if name not in OPEN_CLIP_KNOWN[part] and value and value not in OPEN_CLIP_PLAIN.get(name, ()):
                raise ConfigError(f"{file}: {part}.{name}: {value!r}, which this scorer has no choice for")
    sizes = {
        "vision_cfg": {"width": vision_width, "layers": count(theirs, OPENAI.up(0, "{}"))},
        "text_cfg": {"width": width, "layers": count(theirs, OPENAI.up(1, "{}")), "vocab_size": n_ids},
    }
    for part, values in (("vision_cfg", vision), ("text_cfg", text)):
        for name, size in sizes[part].items():
            if values.get(name) != size:
                raise CheckpointError(f"{file}: {part}.{name} is {values.get(name)}, in {path.name} {size}; they do "
                                      "not belong together")  # fmt: skip
    activation = "gelu_quick" if model.get("quick_gelu") else "gelu"
    n_heads = _n_heads(vision_width, vision.get("head_width", 64))
    towers = Tower(n_heads, activation), Tower(text["heads"], activation)
    return Settings(*towers, marks, **{name: tuple(pixels[name]) for name in ("mean", "std") if pixels.get(name)})


def _hugging_face_settings(checkpoint: Checkpoint, options: Options) -> Settings:
    """By the `config.json` and, where there is one, the `preprocessor_config.json` beside the weights."""
    folder = checkpoint.path.parent
    file = options.settings or folder / CLIPFamily.settings_file
    read = _read_json(file)
    towers = []
    for part, n_heads in (("vision_config", 12), ("text_config", 8)):  # what is not written there is as by default
        values = (read.get(part) or {}) | (read.get(f"{part}_dict") or {})
        activation = values.get("hidden_act", "quick_gelu")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"{file}: {part}.hidden_act: {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        towers.append(Tower(values.get("num_attention_heads", n_heads), ACTIVATIONS[activation],
                            values.get("layer_norm_eps", 1e-5)))  # fmt: skip
    marks = values.get("bos_token_id", 49406), values.get("eos_token_id", 49407)
    if marks[1] == 2:  # in old files, which do not mean it: the end is then found as the highest id
        n_ids = len(checkpoint.tensors[HUGGING_FACE.names["text_embedding.weight"]])
        marks = n_ids - 2, n_ids - 1
    pixels = _read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    found = {name: tuple(pixels[f"image_{name}"]) for name in ("mean", "std") if pixels.get(f"image_{name}")}
    return Settings(*towers, marks, **found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected the model's settings, or give them by --settings"
                              ) from None  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values
