"""A prior: from the embedding of a text to that of an image of it."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.cli import main
from vqt2i.clip import CLIP, CLIPConfig, Prior, PriorConfig, embed_images, embed_texts, modality_gap
from vqt2i.data.images import to_tensor
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.generation.find import open_pipeline, write_pipeline
from vqt2i.generation.parts import PipelineConfig
from vqt2i.generation.pipeline import TextToImage
from vqt2i.generation.prompts import Picture
from vqt2i.gpt import GPT, VectorCondition
from vqt2i.text import pad_texts
from vqt2i.training.batches import Batch
from vqt2i.training.prior import PriorModule, PriorTrainingConfig


@pytest.fixture(scope="module")
def _once() -> dict[str, Path]:
    return {}


@pytest.fixture
def runs(train: Callable[..., Path], _once: dict[str, Path], tmp_path: Path) -> Path:
    """A scorer that knows colours and a prior for it, trained once for all tests of this file."""
    if "runs" not in _once:
        longer = ["trainer.max_steps=60", "trainer.validate_every_steps=60", "trainer.batch_size=24"]
        clip = train("clip", *longer)
        train("prior", *longer, f"scorer={clip / 'model'}")
        _once["runs"] = clip.parent
    return _once["runs"]


@pytest.fixture
def pipeline_parts(runs: Path, make_gpt, model_folders: Path, tmp_path: Path) -> dict[str, Path]:
    """Folders of the parts of a pipeline whose untrained GPT reads that scorer's embeddings, without the prior."""
    vq = read_card(model_folders / "vq")["fingerprint"]
    condition = VectorCondition(width=16, encoder=read_card(runs / "clip" / "model")["fingerprint"])
    gpt = make_gpt(condition=condition, n_image_ids=16, grid_height=4, grid_width=4)
    gpt = GPT(gpt.config.model_copy(update={"image_tokenizer": vq})).eval()
    gpt.reader.text_shift.fill_(0.1)
    save_model(tmp_path / "gpt", gpt, gpt.config, {"kind": "gpt"})
    folders = {"text": model_folders / "text", "vq": model_folders / "vq", "gpt": tmp_path / "gpt"}
    return folders | {"clip": runs / "clip" / "model"}


def uncaptioned(pair: Pair) -> Pair:
    return Pair(pair.key, pair.image_HW3, {})


def read_validation(folder: Path) -> dict[str, float]:
    with open(folder / "metrics.csv", newline="") as file:
        row = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
    return {name: float(value) for name, value in row.items() if name.startswith("val/")}


@torch.no_grad()
def test_it_comes_closer_to_images_never_seen_than_texts_do_and_than_texts_that_are_all_moved_alike(
    runs: Path, tiny_dataset: DataSet, tiny_text
) -> None:
    clip = load_model(runs / "clip" / "model", CLIPConfig, CLIP)
    prior = load_model(runs / "prior" / "model", PriorConfig, Prior)
    pairs = list(tiny_dataset.split("val"))
    image_BE = embed_images(clip, to_tensor(np.stack([pair.image_HW3 for pair in pairs])))
    text_BE = embed_texts(clip, [tiny_text.encode(pair.captions["en"][0]) for pair in pairs])
    gap = modality_gap(image_BE, text_BE)
    cosine = (prior(text_BE) * image_BE).sum(-1).mean()
    assert cosine > gap.shifted_cosine + 0.05 and cosine > gap.cosine + 0.05
    told = read_validation(runs / "prior")
    assert told["val/cosine"] > told["val/shifted_cosine"] > told["val/text_cosine"]
    assert told["val/loss"] == pytest.approx(1 - told["val/cosine"], abs=1e-5)


def test_untrained_it_gives_the_text_itself_and_always_unit_vectors() -> None:
    text_BE = normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    prior = Prior(PriorConfig(width=8, hidden_width=6, n_layers=2, scorer="s"))
    torch.testing.assert_close(prior(text_BE), text_BE)
    torch.nn.init.normal_(prior.mlp[-1].weight)
    torch.testing.assert_close(prior(text_BE).norm(dim=-1), torch.ones(5))
    assert prior(text_BE).sub(text_BE).abs().max() > 0.1


def test_its_scorer_is_frozen_and_not_in_the_checkpoint(runs: Path, train, weights, tmp_path: Path) -> None:
    assert all(name.startswith("mlp.") for name in weights(runs / "prior"))
    (checkpoint, *_) = (runs / "prior" / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(name.startswith("prior.mlp.") for name in state)


@torch.no_grad()
def test_a_pipeline_reads_texts_by_it_and_pictures_as_they_are(
    runs: Path, pipeline_parts: dict[str, Path], tiny_dataset: DataSet
) -> None:
    without = TextToImage.from_parts(pipeline_parts, PipelineConfig(), "cpu")
    pipeline = TextToImage.from_parts(pipeline_parts | {"prior": runs / "prior" / "model"}, PipelineConfig(), "cpu")
    assert pipeline.fingerprints == without.fingerprints | {"prior": pipeline.prior.fingerprint}
    reader, text = pipeline._reader, "a red square"
    found, moved = (np.frombuffer(r.condition(text).values, np.float32).copy() for r in (reader, without._reader))
    own = embed_texts(pipeline.clip, [pipeline.text.encode(text)])
    torch.testing.assert_close(torch.from_numpy(found), pipeline.prior(own)[0])
    torch.testing.assert_close(torch.from_numpy(moved), normalize(own + 0.1, dim=-1)[0])
    picture = Picture(tiny_dataset.split("train")[0].image_HW3, "p")
    assert reader.condition(picture) == without._reader.condition(picture)
    (a,), (b,) = pipeline.generate(text), without.generate(text)
    assert a.image_ids_HW.shape == b.image_ids_HW.shape


def test_a_pipeline_folder_keeps_it(runs: Path, pipeline_parts: dict[str, Path], tmp_path: Path) -> None:
    folders = pipeline_parts | {"prior": runs / "prior" / "model"}
    write_pipeline(folders, PipelineConfig(), tmp_path / "bound", "bf16")
    bound = open_pipeline(str(tmp_path / "bound"), tmp_path, "cpu")
    assert bound.prior.fingerprint == read_card(runs / "prior" / "model")["fingerprint"]
    assert TextToImage.from_parts(pipeline_parts, PipelineConfig(), "cpu").prior is None


def test_the_tools_take_a_run_of_it(runs: Path, pipeline_parts, tmp_path: Path, in_empty_folder, capsys) -> None:
    write_pipeline(pipeline_parts, PipelineConfig(), tmp_path / "bound", "fp32")
    command = ["generate", "a red square", "--n", "1", "--model", str(tmp_path / "bound"), "--out"]
    assert main([*command, "with", "--prior", str(runs / "prior")]) == 0
    assert f"given: prior {runs / 'prior' / 'model'}" in capsys.readouterr().err
    assert main([*command, "without"]) == 0
    assert (
        '"prior"' in Path("with/request.json").read_text() and '"prior"' not in Path("without/request.json").read_text()
    )
    options = ["--model", str(tmp_path / "bound"), "--prior", str(runs / "prior"), "--out", "own"]
    assert main(["make_pipeline", *options]) == 0 and Path("own/prior/card.json").is_file()


def test_it_is_refused_by_a_gpt_that_reads_texts_and_beside_another_scorer(
    runs: Path, model_folders: Path, pipeline_parts: dict[str, Path], train, tmp_path: Path, in_empty_folder, fails
) -> None:
    told = fails("generate", "a", "--model", model_folders, "--prior", runs / "prior")
    assert "a prior makes embeddings, but the GPT reads a text; leave the prior out" in told
    other = train("prior", "trainer.max_steps=1")
    with pytest.raises(CheckpointError, match=r"made with scorer .* train a prior for this scorer"):
        TextToImage.from_parts(pipeline_parts | {"prior": other / "model"}, PipelineConfig(), "cpu")
    write_pipeline(pipeline_parts, PipelineConfig(), tmp_path / "bound", "fp32")
    for wrong, reason in (("nowhere", "no such model folder"), (model_folders / "vq", "not a model of the kind")):
        assert reason in fails("generate", "a", "--model", tmp_path / "bound", "--prior", wrong)


def test_what_it_cannot_be_trained_on_is_refused(train, tiny_dataset: DataSet, tmp_path: Path) -> None:
    bare = {name: [uncaptioned(pair) for pair in tiny_dataset.split(name)] for name in ("train", "val")}
    folder = write_dataset(tmp_path / "bare", bare).folder
    with pytest.raises(ConfigError, match="has no captions; a prior is trained on captioned pairs"):
        train("prior", f"data.path={folder}")
    with pytest.raises(CheckpointError, match="set text_tokenizer to the one that the scorer was trained with"):
        train("prior", "text_tokenizer=tokenizers/bilingual.model")


def test_samples_without_a_caption_are_left_out(tiny_clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(width=16, hidden_width=8, n_layers=1, scorer=tiny_clip.fingerprint))
    torch.nn.init.normal_(prior.mlp[-1].weight)
    module = PriorModule(prior, tiny_clip, PriorTrainingConfig(), 9)
    monkeypatch.setattr(module, "log", lambda name, value: None)
    batch = Batch(torch.rand(4, 3, 16, 16), None, pad_texts([[1], [], [2, 3], []], 12), torch.rand(4))
    kept = torch.tensor([0, 2])
    captioned = Batch(batch.image[kept], None, type(batch.text)(*(t[kept] for t in batch.text)), batch.chance_B[kept])
    torch.testing.assert_close(module.training_step(batch, 0), module.training_step(captioned, 0))
