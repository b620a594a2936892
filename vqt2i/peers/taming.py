"""VQGANs of taming-transformers (Esser et al. 2021, arXiv 2012.09841): Lightning's `.ckpt`, settings in a `.yaml`.

Everything but the size of the images follows from the weights; where a `.yaml` says otherwise, the two do not belong
together.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqt2i.config import build_config, read_yaml_mapping
from vqt2i.errors import CheckpointError
from vqt2i.peers.family import Compared, Family, Options, compare_tokenizer, differing
from vqt2i.peers.reading import Checkpoint
from vqt2i.peers.table import Fill, Table, with_weights
from vqt2i.peers.vqgan import attention_sizes, count, network_misfits, network_table
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import GumbelConfig, QuantizerConfig, VQConfig

IMAGE_SIZE_PX = 256  # of the published ones, where no settings say
NEEDED = ("encoder.conv_in.weight", "encoder.conv_out.weight", "encoder.down.0.block.0.conv1.weight")


def encoder_place(kind: str, level: int, index: int) -> str:
    """Where a layer of the encoder lies."""
    if level < 0:
        return ("mid.block_1", "mid.attn_1", "mid.block_2")[index]
    names = {"res": f"block.{index}", "attention": f"attn.{index}", "down": "downsample", "up": "upsample"}
    return f"down.{level}.{names[kind]}"


def decoder_place(kind: str, level: int, index: int) -> str:
    """Where a layer of the decoder lies; levels count from the finest there too."""
    return encoder_place(kind, level, index).replace("down.", "up.", 1)


class TamingVQGAN(Family):
    """VQModel."""

    name = "taming-vqgan"
    kind = "vqgan"
    repository = "https://github.com/CompVis/taming-transformers"
    licence = "MIT"
    markers = (*NEEDED, "quantize.embedding.weight")
    unused = ("vq", "text_encoder", "text")
    codebook = "quantize.embedding.weight"
    project = "taming"
    weights_file, weights_key, settings_file = "model.ckpt", "state_dict", "model.yaml"
    model = "VQModel"

    def config(self, checkpoint: Checkpoint, options: Options) -> ImageTokenizerConfig:
        theirs, path = checkpoint.tensors, checkpoint.path
        settings = self.settings(path, options)
        native = native_settings(theirs, self.codebook)
        require_same_settings(path, native, settings)
        sizes_px = (options.image_size_px, settings.get("resolution"), IMAGE_SIZE_PX)
        image_size_px = next(size for size in sizes_px if size is not None)
        ch, times = native["ch"], native["ch_mult"]
        values = {
            "image_size_px": image_size_px, "downsample": 2 ** (len(times) - 1), "architecture": "taming",
            "patch_px": 1, "channels": [ch * n for n in times], "stem_channels": ch,
            "latent_channels": native["z_channels"], "n_res_blocks": native["num_res_blocks"],
            "attention_sizes_px": attention_sizes(native["attention_levels"], image_size_px),
            "quantizer": self.quantizer(native["n_embed"], native["embed_dim"], settings),
        }  # fmt: skip
        return build_config(ImageTokenizerConfig, values, str(path))

    def settings(self, path: Path, options: Options) -> dict[str, Any]:
        """What the settings say of the model; empty where there are none."""
        return find_settings(path, options.settings)

    def quantizer(self, n_embed: int, embed_dim: int, settings: Mapping[str, Any]) -> QuantizerConfig:
        """As trained there: its loss has the weight of 0.25 on the codes' side (its setting `legacy`)."""
        return VQConfig(
            codebook_size=n_embed, code_dim=embed_dim, l2_normalised=False, update="gradient", commitment_weight=1.0,
            codebook_weight=0.25, restart_below=0,
        )  # fmt: skip

    def table(self, config: ImageTokenizerConfig) -> Table:
        return network_table(config, encoder_place, decoder_place) | self.quantizer_table()

    def quantizer_table(self) -> Table:
        return with_weights({"quantizer.to_code": "quant_conv", "quantizer.from_code": "post_quant_conv"}) | {
            "quantizer.codebook": self.codebook,
            "quantizer.usage": Fill(1.0),  # an even share: no code is dead
            "quantizer.n_updates": Fill(0),
        }

    def ignored(self, name: str) -> bool:
        return name.startswith("loss.")  # LPIPS and the discriminator

    def misfits(self, config: ImageTokenizerConfig) -> list[str]:
        return network_misfits(config) + differing(config, {"quantizer.kind": "vq", "quantizer.l2_normalised": False})

    def settings_of(self, config: ImageTokenizerConfig) -> dict[str, Any]:
        ddconfig = {
            "double_z": False, "z_channels": config.latent_width, "resolution": config.image_size_px, "in_channels": 3,
            "out_ch": 3, "ch": config.stem_width, "ch_mult": [width // config.stem_width for width in config.channels],
            "num_res_blocks": config.n_res_blocks, "attn_resolutions": list(config.attention_sizes_px),
            "dropout": config.dropout,
        }  # fmt: skip
        params = {
            "embed_dim": config.quantizer.code_dim, "n_embed": config.quantizer.codebook_size, "ddconfig": ddconfig,
            "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"}, **self.more_params(config),
        }  # fmt: skip
        return {"model": {"target": f"taming.models.vqgan.{self.model}", "params": params}}

    def more_params(self, config: ImageTokenizerConfig) -> dict[str, Any]:
        return {}

    def compare(self, model: ImageTokenizer, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        return compare_tokenizer(model, io, lambda x: model.quantizer.to_code(model.encoder(x)))


class TamingGumbel(TamingVQGAN):
    """GumbelVQ."""

    name = "taming-gumbel"
    markers = (*NEEDED, "quantize.embed.weight", "quantize.proj.weight")
    codebook = "quantize.embed.weight"
    model = "GumbelVQ"

    def quantizer(self, n_embed: int, embed_dim: int, settings: Mapping[str, Any]) -> QuantizerConfig:
        return GumbelConfig(codebook_size=n_embed, code_dim=embed_dim, kl_weight=settings.get("kl_weight", 1e-8))

    def quantizer_table(self) -> Table:
        names = {
            "quantizer.to_code.0": "quant_conv",
            "quantizer.to_code.1": "quantize.proj",
            "quantizer.from_code": "post_quant_conv",
        }
        return with_weights(names) | {"quantizer.codebook": self.codebook}

    def misfits(self, config: ImageTokenizerConfig) -> list[str]:
        # its projection to logits is built for inputs of `z_channels`
        expected = {"quantizer.kind": "gumbel", "quantizer.code_dim": config.latent_width}
        return network_misfits(config) + differing(config, expected)

    def more_params(self, config: ImageTokenizerConfig) -> dict[str, Any]:
        quantizer = config.quantizer
        schedule = {"warm_up_steps": 0, "max_decay_steps": 1000001, "lr_start": quantizer.temperature,
                    "lr_max": quantizer.temperature, "lr_min": quantizer.final_temperature}  # fmt: skip
        scheduler = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": schedule}
        return {"kl_weight": quantizer.kl_weight, "temperature_scheduler_config": scheduler}

    def compare(self, model: ImageTokenizer, io: Mapping[str, Tensor]) -> Iterator[Compared]:
        return compare_tokenizer(model, io, lambda x: model.quantizer.to_code[0](model.encoder(x)))


def native_settings(theirs: Mapping[str, Tensor], codebook: str) -> dict[str, Any]:
    """The published settings that the shapes of the weights tell."""
    ch = theirs["encoder.conv_in.weight"].shape[0]
    n_levels = count(theirs, "encoder.down.{}.block.0.conv1.weight")
    level_widths = [theirs[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(n_levels)]
    return {
        "n_embed": theirs[codebook].shape[0],
        "embed_dim": theirs[codebook].shape[1],
        "z_channels": theirs["encoder.conv_out.weight"].shape[0],
        "ch": ch,
        "ch_mult": [width // ch for width in level_widths],
        "num_res_blocks": count(theirs, "encoder.down.0.block.{}.conv1.weight"),
        "attention_levels": [level for level in range(n_levels) if f"encoder.down.{level}.attn.0.q.weight" in theirs],
    }


def find_settings(path: Path, given: Path | None) -> dict[str, Any]:
    """What a `.yaml` says of the model: the one given, else the only one beside the checkpoint, or in `../configs`.

    Raises:
        ConfigError: it cannot be read. CheckpointError: it is of another model.
    """
    beside = [sorted(folder.glob("*.yaml")) for folder in (path.parent, path.parent.parent / "configs")]
    found = next((files[0] for files in beside if len(files) == 1), None) if given is None else given
    if found is None:
        return {}
    values = read_yaml_mapping(found)
    params = (values.get("model") or {}).get("params") or {}
    if not isinstance(params, dict) or "ddconfig" not in params:
        if given is None:
            return {}
        raise CheckpointError(f"{found}: expected the settings of a VQGAN under model.params.ddconfig")
    return {**params, **params["ddconfig"], "file": found}


def require_same_settings(path: Path, native: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the weights are of another size than the settings say."""
    for name, value in native.items():
        if name in settings and settings[name] != value:
            raise CheckpointError(f"{path}: {name} is {value} in the weights, {settings[name]} in {settings['file']}; "
                                  "they do not belong together, give the right one by --settings")  # fmt: skip
