"""A linear probe: features are what they are said to be, the regression finds what is there, training shows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vqt2i.cli import main
from vqt2i.data.images import to_uint8
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import ConfigError, DataError
from vqt2i.evaluation.probe import ProbeConfig, ProbeResult, layer_features, probe
from vqt2i.generation import TextToImage
from vqt2i.generation.parts import PipelineConfig
from vqt2i.gpt import (
    GPT,
    GPTConfig,
    LabelCondition,
    LayoutConfig,
    LossWeights,
    LowResolutionCondition,
    VectorCondition,
    Vectors,
    gpt_loss,
)
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.vq import PaletteConfig, PaletteTokenizer

SIDE, N_COLOURS = 6, 8
KINDS = {
    "text": {},
    "vectors": {"condition": VectorCondition(n_vectors=2, width=4, encoder="c")},
    "label": {"condition": LabelCondition(n_labels=3)},
    "none": {"condition": LabelCondition(), "positions": "sequence"},
}
PATTERNS = {
    "columns": lambda y, x: x,
    "rows": lambda y, x: y,
    "chequers": lambda y, x: x + y,
    "fields": lambda y, x: x // 2 + y // 2,
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_normed_inputs_of_blocks_averaged_over_the_image(make_gpt, kind: str) -> None:
    gpt = make_gpt(**KINDS[kind])
    ids_NI = torch.randint(6, (40, 6), generator=torch.Generator().manual_seed(0))  # more than are read at once
    found = layer_features(gpt, ids_NI)
    given = torch.full((40,), gpt.config.condition.n_labels) if kind in ("label", "none") else None
    if kind == "text":
        given = gpt.reader.collate([()] * 40, gpt.device)
    elif kind == "vectors":
        given = gpt.reader.collate([gpt.reader.null(Vectors(2))] * 40, gpt.device)
    sequences = gpt.reader(given).then(gpt.layout.image_part(ids_NI))
    assert len(found) == len(gpt.transformer.blocks) + 1
    first = gpt.transformer.blocks[0].attention_norm(gpt.embed(sequences)[0])[:, -6:].mean(1)
    torch.testing.assert_close(found[0], first)
    torch.testing.assert_close(found[-1], gpt(sequences)[:, -6:].mean(1))
    assert not gpt.transformer.norm._forward_hooks


# --- patterns of two colours: which colours, and how often, says nothing of the class ---


def pattern_images(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """Ids (n, SIDE, SIDE) and classes."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:SIDE, :SIDE]
    ids, names = [], []
    for name in rng.choice(list(PATTERNS), n):
        two = rng.choice(N_COLOURS, 2, replace=False)
        ids.append(two[(PATTERNS[name](y, x) + rng.integers(2)) % 2])
        names.append(str(name))
    return torch.from_numpy(np.stack(ids)), names


@pytest.fixture(scope="module")
def palette() -> PaletteTokenizer:
    tokenizer = PaletteTokenizer(PaletteConfig(image_size_px=SIDE, n_colours=N_COLOURS)).eval()
    levels = torch.arange(N_COLOURS)
    tokenizer.colours_K3.copy_(torch.stack((levels % 2 * 200, levels // 2 % 2 * 200, levels // 4 * 200), 1))
    tokenizer.fingerprint = "i"
    return tokenizer


@pytest.fixture(scope="module")
def patterns(palette: PaletteTokenizer, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    splits = {}
    for split, (n, seed) in {"train": (200, 1), "val": (200, 2)}.items():
        ids_NHW, names = pattern_images(n, seed)
        images = to_uint8(palette.decode(ids_NHW))
        splits[split] = [
            Pair(f"{split}{i}", image, {}, label=name)
            for i, (image, name) in enumerate(zip(images, names, strict=True))
        ]
    return write_dataset(tmp_path_factory.mktemp("probe") / "patterns", splits)


@pytest.fixture(scope="module")
def pipeline(palette: PaletteTokenizer) -> TextToImage:
    """A GPT of pixels that has learned the patterns, their classes unseen."""
    torch.manual_seed(0)
    config = GPTConfig(
        transformer=TransformerConfig(width=32, n_layers=3, n_heads=2, mlp_width=64),
        layout=LayoutConfig(n_image_ids=N_COLOURS, grid_height=SIDE, grid_width=SIDE),
        condition=LabelCondition(), image_tokenizer="i",
    )  # fmt: skip
    gpt, ids_NI = GPT(config), pattern_images(2000, 3)[0].flatten(1)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=8e-3)
    for _ in range(200):
        batch_BI = ids_NI[torch.randint(len(ids_NI), (32,))]
        loss = gpt_loss(gpt, torch.zeros(32, dtype=torch.long), batch_BI, 0, LossWeights())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    gpt.fingerprint = "g"
    return TextToImage(None, palette, gpt.eval(), None, PipelineConfig())


@pytest.fixture(scope="module")
def found(pipeline: TextToImage, patterns: DataSet) -> ProbeResult:
    return probe(pipeline, patterns, ProbeConfig())


def test_what_was_learned_without_classes_tells_them_better_than_random_weights_do(found: ProbeResult) -> None:
    assert len(found.layers) == len(found.random) == 4
    assert found.layers[found.best] == max(found.layers) > max(found.random) + 0.1
    assert max(found.layers) > found.guess + 0.2
    assert 0 < found.best, "deeper than the embeddings"


def test_counts_of_ids_tell_nothing_here_and_the_embeddings_no_more(found: ProbeResult) -> None:
    for share in (found.id_counts, found.layers[0], found.random[0]):
        assert share < found.guess + 0.1


def test_equal_settings_give_equal_results(pipeline: TextToImage, patterns: DataSet) -> None:
    few = ProbeConfig(n_train=60, n_validation=40)
    a, b = (probe(pipeline, patterns, few) for _ in range(2))
    assert a == b and (a.n_train, a.n_validation, a.n_classes) == (60, 40, 4)
    assert a.to_json()["best"] == a.best


def test_the_regression_finds_what_is_there(palette, tmp_path: Path, pipeline) -> None:
    images = to_uint8(palette.decode(torch.arange(80)[:, None, None].expand(80, SIDE, SIDE) % N_COLOURS))
    splits = {
        split: [Pair(f"{split}{i}", images[i], {}, label="ab"[i % N_COLOURS // 4]) for i in range(n)]
        for split, n in {"train": 80, "val": 8}.items()
    }
    dataset = write_dataset(tmp_path / "set", splits)
    found = probe(pipeline, dataset, ProbeConfig())
    assert found.pixels == found.id_counts == found.random[0] == 1.0 and found.guess == 0.5


def test_data_that_cannot_be_probed_is_told(pipeline: TextToImage, tiny_dataset: DataSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its samples have no classes, which a probe tells"):
        probe(pipeline, tiny_dataset, ProbeConfig())
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    val = [Pair(label, black, {}, label=label) for label in "ab"]
    dataset = write_dataset(
        tmp_path / "set", {"train": [Pair(f"{i}", black, {}, label="a") for i in range(3)], "val": val}
    )
    with pytest.raises(DataError, match="the 3 training images are all of one class"):
        probe(pipeline, dataset, ProbeConfig())
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        probe(pipeline, dataset, ProbeConfig(validation_split="test"))


def test_a_gpt_of_smaller_pictures_is_refused(pipeline: TextToImage, patterns: DataSet, make_gpt) -> None:
    sizes = {"n_text_ids": 10, "text_length": 5, "grid_height": 4, "grid_width": 4}
    upscaler = make_gpt(condition=LowResolutionCondition(), **sizes)
    with pytest.raises(ConfigError, match="this GPT draws from smaller pictures"):
        probe(TextToImage(None, pipeline.vq, upscaler, None, PipelineConfig()), patterns, ProbeConfig())


def test_the_tool_prints_every_layer_and_writes_the_numbers(
    model_folders: Path, tiny_dataset: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails
) -> None:
    splits = {
        name: [Pair(p.key, p.image_HW3, p.captions, label=p.captions["en"][0]) for p in tiny_dataset.split(name)]
        for name in ("train", "val")
    }
    write_dataset(tmp_path / "set", splits)
    out = tmp_path / "probe.json"
    assert main(["probe", str(model_folders), str(tmp_path / "set"), "--n-train", "20", "--out", str(out)]) == 0
    told, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "4 classes, 20 images to learn from, 7 to be told" in told and len(told.splitlines()) == 2 + 3 + 1
    assert written["protocol"]["n_train"] == 20 and len(written["results"]["layers"]) == 3
    assert set(written["models"]) == {"text", "vq", "gpt", "clip"}
    assert "probe: n_train" in fails("probe", model_folders, tmp_path / "set", "--n-train", 1)
    assert "its samples have no classes" in fails("probe", model_folders, tiny_dataset.folder)
