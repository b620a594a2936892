"""Public checkpoints in small: those of the peers' own code, where they lie beside the checkout, and of our own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from torch import nn

from vqt2i.checkpoint import save_model
from vqt2i.clip import CLIPConfig
from vqt2i.clip.model import ClassReadout, EndReadout
from vqt2i.config import Config
from vqt2i.gpt import (
    FeatureCondition,
    GPTConfig,
    HeadConfig,
    LabelCondition,
    LayoutConfig,
    LowResolutionCondition,
    MLPProjection,
    VectorCondition,
)
from vqt2i.nn.sparsity import RowColumnConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.peers import FAMILIES, Family, Options
from vqt2i.peers.clip import OPENAI
from vqt2i.peers.clipgen import ClipGenCLIP
from vqt2i.peers.cogview import NORM_EPS
from vqt2i.peers.family import MODELS
from vqt2i.peers.table import exported
from vqt2i.vq import ImageTokenizerConfig
from vqt2i.vq.quantizer import GumbelConfig, VQConfig

SHARED = Path(__file__).parents[3] / "shared" / "fixtures" / "peers"
# a tokenizer of youtokentome: ▁ a b c, ab, ▁c; unknown 1, padding 0, begin 2, end 3
YTTM = "4 2\n9601 4\n97 5\n98 6\n99 7\n5 6 8\n4 7 9\n1 0 2 3\n"
# one like minDALL-E's
CHARACTERS = {"[UNK]": 0, "a": 1, "b": 2, "a</w>": 3, "b</w>": 4, "ab</w>": 5, "c</w>": 6, "[PAD]": 7, "c": 8, "d": 9}
N_IDS, N_TEXT = 12, 10
PARTS = {"image_tokenizer": "v", "text_tokenizer": "t"}
TAMING = {
    "architecture": "taming", "image_size_px": 16, "downsample": 2, "patch_px": 1, "channels": (64, 32),
    "stem_channels": 32, "latent_channels": 12, "attention_sizes_px": (8,),
}  # fmt: skip
CODES = {"codebook_size": N_IDS, "code_dim": 6, "restart_below": 0}
LEARNED = {**CODES, "l2_normalised": False, "update": "gradient"}
TRANSFORMER = TransformerConfig(
    width=32, n_layers=3, n_heads=2, mlp_width=48, norm="layer", norm_eps=1e-5, mlp="gelu", bias=True, qk_norm=False
)
SANDWICH = TRANSFORMER.model_copy(update={"norm_placement": "sandwich", "mlp": "gelu_tanh"})
LAYOUT = LayoutConfig(n_image_ids=N_IDS, grid_height=8, grid_width=8)
BARE = LAYOUT.model_copy(update={"n_text_ids": N_TEXT, "text_length": 7, "padding": "bare"})
TOWER = TRANSFORMER.model_copy(update={"width": 64, "n_heads": 1, "n_layers": 1, "mlp": "gelu_quick"})
CLIP_CONFIG = CLIPConfig(
    image_size_px=16, patch_size_px=8, text_length=5, n_text_ids=9, vision=TOWER, text=TOWER, embedding_width=6,
    text_tokenizer="unknown", image_readout=ClassReadout(), text_readout=EndReadout(start_id=7, end_id=8),
    pixel_mean=(0.48145466, 0.4578275, 0.40821073), pixel_std=(0.26862954, 0.26130258, 0.27577711),
)  # fmt: skip
LLAMAGEN = {
    "transformer": TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=96, norm_eps=1e-5, qk_norm=False),
    "layout": LAYOUT, "positions": "rotary_image", "image_tokenizer": "v",
}  # fmt: skip
COGVIEW = {
    "transformer": SANDWICH.model_copy(update={"norm": "scaled_layer", "norm_eps": NORM_EPS}), "positions": "sequence",
    "layout": BARE.model_copy(update={"padding": "masked", "image_marks": "paired"}), **PARTS,
}  # fmt: skip
# a model of ours for each family, small
CONFIGS: dict[str, Config] = {
    "taming-vqgan": ImageTokenizerConfig(
        **TAMING, quantizer=VQConfig(**LEARNED, codebook_weight=0.25, commitment_weight=1.0)
    ),
    "taming-gumbel": ImageTokenizerConfig(
        **TAMING, quantizer=GumbelConfig(codebook_size=N_IDS, code_dim=6, kl_weight=1e-8)
    ),
    "llamagen-vq": ImageTokenizerConfig(
        **TAMING, quantizer=VQConfig(**CODES, update="gradient", codebook_weight=1.0)
    ),
    "llamagen-gpt-c2i": GPTConfig(**LLAMAGEN, condition=LabelCondition(n_labels=3)),
    "llamagen-gpt-t2i": GPTConfig(
        **LLAMAGEN, condition=FeatureCondition(
            n_vectors=6, width=12, projection=MLPProjection(width=32, bias=False), cleaning="web", encoder="t"
        ),
    ),
    "clip": CLIP_CONFIG,
    "mindalle-vq": ImageTokenizerConfig(
        **TAMING, quantizer=VQConfig(**LEARNED, codebook_weight=0.25, commitment_weight=1.0)
    ),
    "mindalle-gpt": GPTConfig(transformer=TRANSFORMER, layout=BARE, positions="raster", **PARTS),
    "rudalle-gpt": GPTConfig(
        transformer=SANDWICH.model_copy(update={"pb_relax": True}), layout=BARE, positions="learned", **PARTS,
        sparsity=RowColumnConfig(conv_wraps=False), head=HeadConfig(norm=True, bias=True),
    ),
    "cogview-vq": ImageTokenizerConfig(
        architecture="strided", image_size_px=64, downsample=8, patch_px=2, channels=(8, 12, 16), latent_channels=6,
        n_res_blocks=0, quantizer=VQConfig(**CODES, l2_normalised=False, usage_decay=0.99),
    ),
    "cogview-gpt": GPTConfig(**COGVIEW),
    "cogview-caption": GPTConfig(**COGVIEW),
    "cogview-sr": GPTConfig(**COGVIEW, condition=LowResolutionCondition()),
    "clip-gen-clip": CLIP_CONFIG,
    "clip-gen-vq": ImageTokenizerConfig(
        **TAMING, norm_eps=1e-5, quantizer=VQConfig(**LEARNED, codebook_weight=1.0)
    ),
    "clip-gen-gpt": GPTConfig(
        transformer=TRANSFORMER, layout=LAYOUT, condition=VectorCondition(width=6, encoder="c"), positions="sequence",
        head=HeadConfig(bias=True), image_tokenizer="v",
    ),
}  # fmt: skip
KEYS = {"taming-vqgan": "state_dict", "taming-gumbel": "state_dict", "mindalle-vq": "state_dict",
        "mindalle-gpt": "state_dict", "rudalle-gpt": None, "clip": None, "clip-gen-clip": None}  # fmt: skip


class Native(NamedTuple):
    """A model of ours as a checkpoint of a family. options: what an import of it needs besides; key: where its weights
    lie in the file, None for the top."""

    name: str
    family: Family
    model: nn.Module
    path: Path
    options: Options
    key: str | None

    @property
    def arguments(self) -> list[object]:
        """The options on the command line."""
        given = {name.replace("_", "-").replace("-px", ""): v for name, v in self.options._asdict().items()}
        return [part for name, value in given.items() if value is not None for part in (f"--{name}", value)]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        content = torch.load(self.path)
        return content if self.key is None else content[self.key]

    def save(self, weights: dict[str, torch.Tensor], **around: object) -> None:
        """Write other weights, and more beside them."""
        torch.save({**(weights if self.key is None else {self.key: weights}), **around}, self.path)


@pytest.fixture
def published() -> Callable[[str], Path]:
    """The folder of a published checkpoint by its name; skips the test where it is not there."""

    def find(name: str) -> Path:
        if not SHARED.is_dir():
            pytest.skip("the published checkpoints are not beside this checkout")
        return SHARED / name

    return find


@pytest.fixture
def save_native() -> Callable[..., Path]:
    """Writes one of our models as a checkpoint in a family's layout, its weights under `key`, and more around them."""

    def save(path: Path, family: str, model: nn.Module, key: str = "state_dict", **around: object) -> Path:
        torch.save({key: exported(FAMILIES[family].table(model.config), model.state_dict()), **around}, path)
        return path

    return save


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Fills a model with random numbers, so that a part that is left out is noticed."""

    @torch.no_grad()
    def fill(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
        return model.eval()

    return fill


@torch.no_grad()
def as_theirs(model: nn.Module, name: str) -> nn.Module:
    """What the family ties, or has no place for, as it is there."""
    if name == "cogview-vq":
        model.quantizer.from_code.weight.copy_(torch.eye(model.config.latent_width)[..., None, None])
        model.quantizer.from_code.bias.zero_()
        model.encoder.pixel_mean.copy_(2 * torch.tensor([0.79093, 0.76271, 0.75340]) - 1)
        model.encoder.pixel_std.copy_(2 * torch.tensor([0.30379, 0.32279, 0.32800]))
    if hasattr(getattr(model, "quantizer", None), "usage"):
        model.quantizer.usage.fill_(1.0)
        if name == "cogview-vq":
            model.quantizer.latent_sums.copy_(model.quantizer.codebook)
    if name == "mindalle-gpt":
        model.embedding.weight[model.layout.first_learned_pad :] = model.embedding.weight[7]  # [PAD]
    if name.startswith("cogview") and name != "cogview-vq":
        rows = model.embedding.weight
        model.head.weight.copy_(rows[: model.layout.n_targets])
        rows[model.layout.bot] = rows[model.layout.t2i]
    if name == "clip-gen-gpt":
        model.reader.null_vectors.zero_()
        model.position_embeddings[0].weight[-1] = 0
    if name in ("mindalle-gpt", "rudalle-gpt"):
        for table in model.position_embeddings:
            table.weight[0] = 0
    return model


@pytest.fixture
def build(randomised) -> Callable[[str], nn.Module]:
    """A model of ours that a family's checkpoint can hold, by the family's name."""
    return lambda name: as_theirs(randomised(MODELS[FAMILIES[name].kind][1](CONFIGS[name])), name)


@pytest.fixture
def vq(tmp_path: Path, build) -> Path:
    """The folder of an image tokenizer for the GPTs: 8 x 8 of its ids."""
    save_model(tmp_path / "vq", build("mindalle-vq"), CONFIGS["mindalle-vq"], {"kind": "vqgan"})
    return tmp_path / "vq"


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    (tmp_path / "bpe.model").write_text(YTTM)
    return tmp_path / "bpe.model"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """What is read of a scorer's folder, where its embeddings are not."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "card.json").write_text(json.dumps({"kind": "clip", "fingerprint": "c"}))
    return tmp_path / "clip"


@pytest.fixture
def native(tmp_path: Path, build, request) -> Callable[[str], Native]:
    """Writes a model of ours as a checkpoint of a family, with what an import of it needs."""

    def make(name: str) -> Native:
        family = ClipGenCLIP(OPENAI) if name == "clip-gen-clip" else FAMILIES[name]
        model, key = build(name), KEYS.get(name, "model")
        weights = exported(family.table(model.config), model.state_dict()) | family.more_tensors()
        folder = tmp_path / "native"
        folder.mkdir()
        made = Native(name, family, model, folder / "model.pt", options(name, folder), key)
        made.save(weights)
        return made

    def options(name: str, folder: Path) -> Options:
        if name == "clip":
            (folder / "config.json").write_text(json.dumps(FAMILIES["clip"].settings_of(CONFIGS["clip"])))
        if isinstance(CONFIGS[name], ImageTokenizerConfig):
            return Options(image_size_px=CONFIGS[name].image_size_px)
        if not isinstance(CONFIGS[name], GPTConfig):
            return Options()
        vq, more = request.getfixturevalue("vq"), {}
        arguments = folder / "arguments.json"
        arguments.write_text(json.dumps({"num_attention_heads": 2, "n_head": 2, "txt_num_tokens": N_TEXT}))
        if name == "mindalle-gpt":
            arguments = folder / "arguments.yaml"
            arguments.write_text(yaml.safe_dump({"stage2": {"hparams": {"n_heads": 2}}}))
            (folder / "tokenizer").mkdir()
            (folder / "tokenizer" / "bpe-vocab.json").write_text(json.dumps(CHARACTERS))
            (folder / "tokenizer" / "bpe-merges.txt").write_text("#version: 0.2\na b</w>\n")
        elif name in ("llamagen-gpt-t2i", "clip-gen-gpt"):
            more["text_encoder"] = request.getfixturevalue("tiny_t5" if name == "llamagen-gpt-t2i" else "clip")
        elif name != "llamagen-gpt-c2i":
            more["text"] = request.getfixturevalue("bpe")
        return Options(settings=arguments, vq=vq, **more)

    return make
