"""Distances agree with torch-fidelity's own command line on the same two folders."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
from PIL import Image
from torch import nn
from torch_fidelity.fidelity import main as fidelity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vqt2i.checkpoint import load_model
from vqt2i.clip import CLIP, CLIPConfig
from vqt2i.errors import CheckpointError, DataError
from vqt2i.evaluation.features import (
    CLIP_TOWER,
    Extractor,
    Features,
    distances,
    estimate_distances,
    frechet_distance,
    register_clip_tower,
)

N = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of pictures of 16 px: noise, and darker noise."""
    rng, paths = np.random.default_rng(0), []
    for name, most in (("drawn", 255), ("real", 120)):
        paths.append(tmp_path_factory.mktemp(name))
        for i in range(N):
            Image.fromarray(rng.integers(0, most, (16, 16, 3), dtype=np.uint8)).save(paths[-1] / f"{i:02d}.png")
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file as torch-fidelity's, of random numbers."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        module = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(module.state_dict(), path)
    return path


def read(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    options = ["--fid", "--kid", "--prc", "--kid-subset-size", N, "--json", "--silent", "--no-cache", "--save-cpu-ram"]
    monkeypatch.setattr(sys, "argv", ["fidelity", "--cpu", *map(str, [*options, *arguments])])
    fidelity()
    return json.loads(capsys.readouterr().out)


def test_inception_gives_what_the_command_line_gives(
    folders, random_inception: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["--isc", "--input1", folders[0], "--input2", folders[1]]
    weights = ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", random_inception]
    told = command_line(monkeypatch, capsys, *inputs, *weights)
    extractor = Extractor.inception(random_inception, "cpu")
    found = distances(*(extractor(read(folder)) for folder in folders), extractor.prefix)
    assert found == pytest.approx({
        "fid": told["frechet_inception_distance"], "kid": told["kernel_inception_distance_mean"],
        "inception_score": told["inception_score_mean"], "precision": told["precision"], "recall": told["recall"],
    }, rel=1e-6)  # fmt: skip
    assert found["fid"] > 1 and extractor.protocol["extractor"] == "inception-v3-compat"


def test_the_image_tower_of_a_clip_gives_what_the_command_line_gives_and_is_called_so(
    folders, model_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_clip_tower()
    register_clip_tower()
    inputs = ["--input1", folders[0], "--input2", folders[1], "--feature-extractor", CLIP_TOWER]
    told = command_line(monkeypatch, capsys, *inputs, "--feature-extractor-weights-path", model_folders / "clip")
    extractor = Extractor.clip_tower(load_model(model_folders / "clip", CLIPConfig, CLIP))
    found = distances(*(extractor(read(folder)) for folder in folders), extractor.prefix)
    assert found == pytest.approx({
        "clip_frechet_distance": told["frechet_inception_distance"],
        "clip_kernel_distance": told["kernel_inception_distance_mean"],
        "clip_precision": told["precision"], "clip_recall": told["recall"],
    }, rel=1e-6)  # fmt: skip


@pytest.mark.parametrize(("n", "width"), [(30, 8), (12, 40)])
def test_the_distance_of_resamples_is_that_of_torch_fidelity(n: int, width: int) -> None:
    torch.manual_seed(n)
    first, second = torch.randn(n, width), torch.randn(n + 3, width) * 2 + 1
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (first, second)), verbose=False)
    assert frechet_distance(first, second) == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_intervals_hold_the_values_and_need_enough_pictures() -> None:
    torch.manual_seed(0)
    drawn, real = (Features(torch.randn(40, 4) + shift, None) for shift in (0, 1))
    found = estimate_distances(drawn, real, "clip_")
    assert {name: estimate.value for name, estimate in found.items()} == distances(drawn, real, "clip_")
    for estimate in found.values():
        assert estimate.low <= estimate.value <= estimate.high and estimate.n == 40
    assert found["clip_frechet_distance"].low > 0
    with pytest.raises(DataError, match="between 19 and 40 pictures: expected 20 or more"):
        estimate_distances(drawn.of(np.arange(19)), real, "")


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_weights_that_are_none_are_refused_and_nothing_in_them_runs(in_empty_folder: Path) -> None:
    Path("attack.pth").write_bytes(pickle.dumps(Attack()))
    Path("text.pth").write_text("no weights")
    torch.save({"conv": torch.ones(1)}, "other.pth")
    torch.save({"x": Attack()}, "attack2.pth")
    for name in ("attack.pth", "attack2.pth", "text.pth", "other.pth", "none.pth"):
        with pytest.raises(CheckpointError, match=rf"{name}: .*expected torch-fidelity's Inception .*as a local file"):
            Extractor.inception(Path(name), "cpu")
    assert not Path("attacked").exists()
