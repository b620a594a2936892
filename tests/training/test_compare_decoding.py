"""That what is timed is what is said; how fast it is no test says."""

import pytest
import torch

from vqt2i.cli import main
from vqt2i.gpt import GPT
from vqt2i.training.compare import llama
from vqt2i.training.compare_decoding import _least_seconds, _our_decoding, _their_decoding


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_both_draw_every_token_of_every_image_and_read_the_whole_text(make_gpt, guided: bool) -> None:
    gpt: GPT = make_gpt()
    other = llama(gpt.config, use_cache=True).eval()
    sizes: dict[str, list] = {"ours": [], "theirs": []}
    gpt.embedding.register_forward_hook(lambda _, args, out: sizes["ours"].append(tuple(args[0].shape)))
    other.model.embed_tokens.register_forward_hook(lambda _, args, out: sizes["theirs"].append(tuple(args[0].shape)))
    assert _our_decoding(gpt, 3, guided)().flatten(1).shape == (3, 6)
    assert _their_decoding(other, gpt, 3, guided)().shape == (3, 6)
    rows = 6 if guided else 3
    null = [(1, 4)] if guided else []  # the empty text, padded by one
    assert sizes["ours"] == [(1, 8), *null, *[(rows, 1)] * 5]
    assert sizes["theirs"] == [(rows, 8), *[(rows, 1)] * 5]


def test_the_least_time_is_that_of_the_weights_or_of_the_products(make_gpt, monkeypatch) -> None:
    monkeypatch.setattr("vqt2i.training.compare_decoding.memory_bandwidth", lambda device_type: 1e9)
    gpt: GPT = make_gpt()
    blocks = sum(p.numel() for p in gpt.transformer.parameters())
    step = blocks + 32 * 6
    few = _least_seconds(gpt, 1, False, 1e12, 4)
    assert few == pytest.approx(2 * blocks * 8 / 1e12 + 5 * 4 * step / 1e9)
    many = _least_seconds(gpt, 10_000, True, 1e12, 4)
    assert many == pytest.approx(2 * blocks * 8 / 1e12 + 5 * 2 * step * 20_000 / 1e12)


def test_benchmark_generate_prints_both_and_their_ratio(untrained_gpt, capsys) -> None:
    command = ["benchmark", "generate", "--config", str(untrained_gpt), "--rounds", "1", "--tokens", "4"]
    assert main([*command, "--images", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert "30 image ids, 5 + 4 tokens" in out and "memory is read at" in out
    rows = [f"{p}, {n} images, {g}:" for p in ("fp32", "bf16") for n in (1, 2) for g in ("not guided", "guided")]
    assert [line for line in out.splitlines() if line.endswith("guided:")] == rows
    assert out.count("vqt2i : transformers = ") == 8 and out.count("images/s") == 8


def test_benchmark_generate_in_int8_states_no_rate_of_products(untrained_gpt, capsys) -> None:
    command = ["benchmark", "generate", "--config", str(untrained_gpt), "--rounds", "1", "--precision", "int8"]
    assert main([*command, "--images", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("int8, 2 images") == 2 and "products" not in out


def test_numbers_below_one_are_refused(fails) -> None:
    for option in ("--images", "--tokens", "--rounds"):
        assert f"{option} 0: expected 1 or more" in fails("benchmark", "generate", option, 0)
