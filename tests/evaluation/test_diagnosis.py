"""The shipped weights with a stage broken on purpose: the diagnosis names that stage, and none where none is broken."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.cli import main
from vqt2i.data.shapes import pairs
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import DataError
from vqt2i.evaluation.diagnosis import Diagnosis, DiagnosisConfig, diagnose
from vqt2i.evaluation.diagnosis_page import write_page
from vqt2i.generation import SamplingConfig, TextToImage
from vqt2i.generation.find import SHIPPED
from vqt2i.gpt import GPT

CONFIG = DiagnosisConfig(n_samples=16, n_drawn=2, overfit_batch=4, overfit_steps=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return write_dataset(folder, {split: pairs(split, 16, 7, 32) for split in ("train", "val")})


@pytest.fixture
def pipeline() -> TextToImage:
    torch.manual_seed(0)
    return TextToImage.load(SHIPPED / "shapes32", "cpu")


@pytest.fixture(scope="module")
def whole(dataset: DataSet) -> Diagnosis:
    return diagnose(TextToImage.load(SHIPPED / "shapes32", "cpu"), dataset, CONFIG)


@torch.no_grad()
def noise_decoder(pipeline: TextToImage) -> None:
    for weight in pipeline.vq.decoder.parameters():
        weight += torch.randn_like(weight) * weight.square().mean().sqrt()


@torch.no_grad()
def shuffle_text_embedding(pipeline: TextToImage) -> None:
    n = pipeline.text.n_ids
    weight = pipeline.gpt.embedding.weight
    weight[:n] = weight[torch.randperm(n)]


def forget_training(pipeline: TextToImage) -> None:
    pipeline.gpt = GPT(pipeline.gpt.config).eval()


def sample_wildly(pipeline: TextToImage) -> None:
    pipeline.config = pipeline.config.model_copy(update={"sampling": SamplingConfig(temperature=20)})


BROKEN = {
    "image tokenizer": noise_decoder,
    "text conditioning": shuffle_text_embedding,
    "GPT": forget_training,
    "sampling": sample_wildly,
}


@pytest.mark.parametrize(("stage", "damage"), BROKEN.items(), ids=BROKEN)
def test_a_stage_that_is_broken_is_named(
    pipeline: TextToImage, dataset: DataSet, stage: str, damage: Callable[[TextToImage], None]
) -> None:
    damage(pipeline)
    found = diagnose(pipeline, dataset, CONFIG)
    assert found.weakest.name == stage
    assert found.verdict.startswith(f"The {stage} is the weak stage: ") and found.weakest.reason in found.verdict
    assert [s.name for s in found.stages if s.weak] == [stage] or stage == "GPT"  # without it nothing understands texts


def test_nothing_is_broken_in_the_shipped_weights(whole: Diagnosis) -> None:
    assert whole.weakest is None and whole.verdict == "No stage is broken."
    losses = whole.losses
    assert losses.image < losses.unconditional < losses.shuffled < losses.frequencies
    assert whole.overfit[-1] < whole.overfit[0] and len(whole.overfit) == 5
    assert whole.by_position.shape == (8, 8)
    assert whole.by_position.mean() == pytest.approx(losses.image, rel=1e-5)
    assert whole.psnr > 28 > whole.patch_psnr


def test_diagnosing_changes_no_model(pipeline: TextToImage, dataset: DataSet, whole: Diagnosis) -> None:
    before = {name: value.clone() for name, value in pipeline.gpt.state_dict().items()}
    again = diagnose(pipeline, dataset, CONFIG)
    assert all(torch.equal(before[name], value) for name, value in pipeline.gpt.state_dict().items())
    assert not pipeline.gpt.training
    assert again.losses == whole.losses and again.stages == whole.stages
    assert all(np.array_equal(a.drawn, b.drawn) for a, b in zip(again.shown, whole.shown, strict=True))


def test_the_page_holds_every_picture_and_needs_nothing_beside_it(whole: Diagnosis) -> None:
    page = write_page(whole, "Diagnosis of <x>", "facts & figures")
    assert "Diagnosis of &lt;x&gt;" in page and "facts &amp; figures" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 4 * CONFIG.n_drawn + 2  # four columns of each sample, the grid and its scale
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "href=" not in page and "<script" not in page
    for stage in whole.stages:
        assert f"<td>{stage.name}<td>fine" in page


def test_the_command_writes_the_page_and_the_numbers(
    model_folders: Path, tiny_dataset: DataSet, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    options = ["--n-samples", "4", "--n-drawn", "2", "--overfit-steps", "2", "--out", str(out)]
    assert main(["diagnose", str(model_folders), str(tiny_dataset.folder), *options]) == 0
    numbers = json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))
    assert numbers["verdict"] in unescape((out / "report.html").read_text(encoding="utf-8"))
    assert numbers["verdict"] in capsys.readouterr().out
    assert numbers["settings"]["n_samples"] == 4 and len(numbers["by_position"]) == 4
    assert numbers["verdict"].startswith("The ")  # nothing in it is trained


def test_what_cannot_be_diagnosed_is_refused(pipeline, model_folders: Path, tiny_dataset, tmp_path, fails) -> None:
    assert "no such folder" in fails("diagnose", model_folders, tmp_path / "none")
    assert "no split" in fails("diagnose", model_folders, tiny_dataset.folder, "--validation-split", "x")
    assert "n_samples" in fails("diagnose", model_folders, tiny_dataset.folder, "--n-samples", 1)
    silent = [replace(pair, captions={}) for pair in pairs("val", 2, 0, 32)]
    data = write_dataset(tmp_path / "silent", {"train": silent})
    with pytest.raises(DataError, match=r"2 samples, 0 of them with captions: expected 2 or more"):
        diagnose(pipeline, data, CONFIG)
