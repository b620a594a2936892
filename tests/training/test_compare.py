"""That what is timed is what is said; how fast it is no test says."""

import sys

import pytest
import torch
from torch import nn

from vqt2i.cli import main
from vqt2i.training import compare
from vqt2i.training.compare import Timing, time_in_turns

TINY_VQ = """\
name: tiny
model: {architecture: taming, image_size_px: 16, downsample: 2, patch_px: 1, channels: [64, 64], n_res_blocks: 1,
  quantizer: {codebook_size: 16, code_dim: 4}}
"""


def test_jobs_take_turns_and_their_first_run_does_not_count() -> None:
    order = []
    jobs = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = time_in_turns(jobs, 3, torch.device("cpu"))
    assert order == list("abababab")
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_that_of_a_round() -> None:
    assert Timing([1.0, 2.0, 4.0]).times_as_fast_as(Timing([2.0, 6.0, 4.0])) == (2.0, 1.0, 3.0)


def test_benchmark_train_prints_both_models_and_their_ratio(untrained_gpt, capsys, monkeypatch) -> None:
    sizes = {}

    def remember(model: nn.Module, *args, **kwargs) -> torch.optim.Optimizer:
        sizes[type(model).__name__] = sum(p.numel() for name, p in model.named_parameters())
        return torch.optim.SGD(model.parameters(), lr=0.1)

    monkeypatch.setattr(compare, "build_optimizer", remember)
    command = ["benchmark", "train", "--config", str(untrained_gpt), "--rounds", "1", "--no-compile"]
    assert main([*command, "--batch-size", "2", "--precision", "bf16", "--text-ids", "50"]) == 0
    out = capsys.readouterr().out
    assert "50 text and 30 image ids, 5 + 9 tokens, batches of 2" in out
    assert "vqt2i : transformers = " in out and "of the rate of matrix products" in out
    # ours: norms of queries and keys, and no head rows for the five marks that are never predicted
    assert sizes["GPT"] == sizes["LlamaForCausalLM"] + 2 * 2 * 16 - 5 * 32


def test_benchmark_vqgan_prints_images_a_second(tmp_path, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY_VQ)
    command = ["benchmark", "vqgan", "--config", str(tmp_path / "tiny.yaml"), "--batch-size", "1", "--rounds", "1"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(":")] == [
        "encode:", "decode:", "encode + decode:", "training step:",
    ]  # fmt: skip
    assert out.count("images/s") == 8 and out.count("vqt2i : diffusers = ") == 4


@pytest.mark.parametrize(
    "part, package", [("train", "transformers"), ("generate", "transformers"), ("vqgan", "diffusers")]
)
def test_without_the_other_project_what_to_install_is_told(part, package, untrained_gpt, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if part == "vqgan":
        untrained_gpt.write_text(TINY_VQ)
    assert main(["benchmark", part, "--config", str(untrained_gpt)]) == 2
    assert f"{package}`, which is not installed; pip install 'vqt2i[benchmark]'" in capsys.readouterr().err
