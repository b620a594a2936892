"""Small parts that many tests share: a text tokenizer, a data set of coloured pictures, tiny models.

All are made from fixed seeds once per session, in a temporary folder, and nobody changes them.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqt2i.checkpoint import CONFIG, load_model, save_model
from vqt2i.clip import CLIP, CLIPConfig
from vqt2i.config import load_config, save_config
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.generation.parts import PIPELINE, PipelineConfig
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import (
    GPT,
    ConditionConfig,
    GPTConfig,
    HeadConfig,
    LayoutConfig,
    LowResolutionCondition,
    TextCondition,
)
from vqt2i.nn.sparsity import DenseConfig, PivotWindowConfig, RowColumnConfig, SparsityConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import TextTokenizer
from vqt2i.text.train import TextTokenizerConfig, save_text_tokenizer, train_text_tokenizer
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.config import VQConfig

torch.set_num_threads(1)

COLOURS = {
    "red": ("红色", (220, 40, 40)),
    "green": ("绿色", (40, 190, 60)),
    "blue": ("蓝色", (50, 70, 220)),
    "yellow": ("黄色", (235, 220, 50)),
}
SIZE_PX, GRID, TEXT_LENGTH = 16, 4, 12
TRANSFORMER = TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=48)
DENSE, TEXT, PLAIN_HEAD = DenseConfig(), TextCondition(), HeadConfig()

# of every choice of the transformer and of its positions, in the combinations of published models
WIDE = TransformerConfig(width=32, n_layers=5, n_heads=2, mlp_width=48, bias=True, qk_norm=False)
COGVIEW = {"norm": "scaled_layer", "norm_placement": "sandwich", "mlp": "gelu_tanh", "pb_relax": True}
GPT_KINDS = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "minDALL-E": {"positions": "raster", "transformer": WIDE.model_copy(update={"norm": "layer", "mlp": "gelu"})},
    "CogView": {"positions": "sequence", "transformer": WIDE.model_copy(update=COGVIEW)},
    "CogView's marks": {
        "positions": "sequence", "transformer": WIDE.model_copy(update=COGVIEW), "image_marks": "paired",
    },
    "DALL-E": {
        "positions": "learned", "transformer": WIDE.model_copy(update={"norm": "layer", "mlp": "gelu_quick"}),
        "sparsity": RowColumnConfig(conv_size=3), "padding": "learned",
    },
    "ruDALL-E": {
        "positions": "learned", "transformer": WIDE.model_copy(update=COGVIEW | {"norm": "layer"}), "padding": "bare",
        "sparsity": RowColumnConfig(conv_size=3, conv_wraps=False), "head": HeadConfig(norm=True, bias=True),
    },
    "LlamaGen": {
        "positions": "rotary_image", "transformer": TRANSFORMER.model_copy(update={"norm_eps": 1e-5, "qk_norm": False}),
    },
    "full text": {"text_attention": "full"},
    "full text, learned padding": {
        "positions": "learned", "padding": "learned", "text_attention": "full",
        "sparsity": RowColumnConfig(conv_size=3),
    },
    "pivots": {"transformer": WIDE, "sparsity": PivotWindowConfig(n_pivots=2, block_size=2, n_blocks=1)},
}  # fmt: skip


def coloured_pair(index: int, key: str) -> Pair:
    """A square on a grey ground; colour, place and a little noise follow from the index."""
    rng = np.random.default_rng(index)
    name, (chinese, rgb) = list(COLOURS.items())[index % len(COLOURS)]
    image = np.full((SIZE_PX, SIZE_PX, 3), 128, np.uint8)
    y, x = rng.integers(0, SIZE_PX - 8, 2)
    image[y : y + 8, x : x + 8] = rgb
    image += rng.integers(0, 6, image.shape, dtype=np.uint8)
    captions = {"en": (f"a {name} square", f"square, {name}"), "zh": (f"{chinese}正方形",)}
    return Pair(key, image, captions)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """24 train and 7 val pictures of 16 px, three captions each in two languages."""
    folder = tmp_path_factory.mktemp("data") / "squares"
    counts = {"train": range(24), "val": range(24, 31)}
    splits = {split: [coloured_pair(i, f"s{i:03d}") for i in indices] for split, indices in counts.items()}
    return write_dataset(folder, splits)


@pytest.fixture(scope="session")
def tiny_text() -> TextTokenizer:
    words = [f"a {name} square, {chinese}正方形" for name, (chinese, _) in COLOURS.items()]
    return train_text_tokenizer([*words, "square with words of no use"], TextTokenizerConfig(vocabulary_size=330))


@pytest.fixture
def tiny_t5(tmp_path: Path, tiny_text: TextTokenizer) -> Path:
    """A folder like that of Flan-T5, in small: 12 features."""
    from transformers import T5Config, T5EncoderModel  # takes seconds

    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": tiny_text.n_ids}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(tiny_text.model)
    return tmp_path / "t5"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory, tiny_text: TextTokenizer) -> Path:
    """A pipeline folder of untrained models that belong together: text/, vq/, gpt/, clip/, pipeline.yaml."""
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    torch.manual_seed(0)
    save_text_tokenizer(tiny_text, folder / "text" / "text.model", {})
    vq_config = ImageTokenizerConfig(
        image_size_px=SIZE_PX, downsample=4, channels=(8, 16), quantizer=VQConfig(codebook_size=16, code_dim=4)
    )
    vq = save_model(folder / "vq", ImageTokenizer(vq_config), vq_config, {"kind": "vqgan"})
    layout = LayoutConfig(
        n_text_ids=tiny_text.n_ids, n_image_ids=16, text_length=TEXT_LENGTH, grid_height=GRID, grid_width=GRID
    )
    gpt_config = GPTConfig(
        transformer=TRANSFORMER, layout=layout, text_tokenizer=tiny_text.fingerprint, image_tokenizer=vq
    )
    save_model(folder / "gpt", GPT(gpt_config), gpt_config, {"kind": "gpt"})
    clip_config = CLIPConfig(
        image_size_px=SIZE_PX, patch_size_px=4, text_length=TEXT_LENGTH, n_text_ids=tiny_text.n_ids,
        vision=TRANSFORMER, text=TRANSFORMER, embedding_width=16, text_tokenizer=tiny_text.fingerprint,
    )  # fmt: skip
    save_model(folder / "clip", CLIP(clip_config), clip_config, {"kind": "clip"})
    sampling = SamplingConfig(guidance=2.0)
    save_config(PipelineConfig(sampling=sampling, example_prompts=("a red square",)), folder / PIPELINE)
    return folder


@pytest.fixture(scope="session")
def upscaler_folder(tmp_path_factory: pytest.TempPathFactory, model_folders: Path) -> Path:
    """A pipeline folder of an untrained GPT that upscales, with the tokenizers of `model_folders`."""
    folder = tmp_path_factory.mktemp("models") / "upscaler"
    for part in ("text", "vq"):
        shutil.copytree(model_folders / part, folder / part)
    of_texts = load_config(GPTConfig, model_folders / "gpt" / CONFIG)
    config = of_texts.model_copy(update={"condition": LowResolutionCondition()})
    torch.manual_seed(1)
    save_model(folder / "gpt", GPT(config), config, {"kind": "upscaler"})
    save_config(PipelineConfig(sampling=SamplingConfig(guidance=1.0)), folder / PIPELINE)
    return folder


@pytest.fixture
def tiny_vq(model_folders: Path) -> ImageTokenizer:
    return load_model(model_folders / "vq", ImageTokenizerConfig, ImageTokenizer)


@pytest.fixture
def tiny_clip(model_folders: Path) -> CLIP:
    return load_model(model_folders / "clip", CLIPConfig, CLIP)


@pytest.fixture(scope="session")
def make_gpt() -> Callable[..., GPT]:
    """A function that builds an untrained GPT in evaluation mode, with a 3 x 2 grid so that rows are not columns."""

    def make(
        positions: str = "rotary",
        *,
        seed: int = 0,
        transformer: TransformerConfig = TRANSFORMER,
        sparsity: SparsityConfig = DENSE,
        condition: ConditionConfig = TEXT,
        head: HeadConfig = PLAIN_HEAD,
        **layout: object,
    ) -> GPT:
        read = {"n_text_ids": 10, "text_length": 5} if condition.kind in ("text", "low_resolution") else {}
        sizes = read | {"n_image_ids": 6, "grid_height": 3, "grid_width": 2} | layout
        torch.manual_seed(seed)
        config = GPTConfig(
            transformer=transformer, layout=LayoutConfig(**sizes), condition=condition, positions=positions,
            sparsity=sparsity, head=head, text_tokenizer="t" if read else None, image_tokenizer="i",
        )  # fmt: skip
        return GPT(config).eval()

    return make


@pytest.fixture(params=GPT_KINDS)
def gpt_kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of `make_gpt`: one kind of GPT after the other."""
    return GPT_KINDS[request.param]


@pytest.fixture(params=[name for name, kind in GPT_KINDS.items() if kind.get("padding") != "bare"])
def two_way_kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """As `gpt_kind`, of those that read images before texts too."""
    return GPT_KINDS[request.param]


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a folder with nothing in it: no runs/, no data/."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line with input that cannot work: exit code 2, one or two lines, no traceback; returns them."""
    from vqt2i.cli import main

    def run(*arguments: object) -> str:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's own complaints
            code = stop.code
        told = capsys.readouterr()
        assert code == 2
        assert "Traceback" not in told.err and not told.out
        # argparse puts its usage above the error; a line about which model is used may stand there too
        error = told.err[told.err.index("error: ") :] if "error: " in told.err else told.err
        assert 1 <= len(error.strip().splitlines()) <= 2
        return error

    return run
