"""Muon beside AdamW: the steps of the two libraries' optimizers, under one name."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from vqt2i.errors import ConfigError
from vqt2i.gpt import GPT
from vqt2i.training.optim import MUON_MOMENTUM, MuonAndAdamW, OptimizerConfig, build_optimizer

CONFIG = OptimizerConfig(kind="muon", learning_rate=0.02, weight_decay=0.3)


def step(optimizer: torch.optim.Optimizer, module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def values_of(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in gpt.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_matrices_of_blocks_step_as_torchs_muon_and_all_else_as_its_adamw(make_gpt) -> None:
    ours, theirs = make_gpt(seed=0), make_gpt(seed=0)
    optimizer = build_optimizer(ours, CONFIG)
    hidden = {name for name, p in theirs.named_parameters() if ".blocks." in name and p.ndim == 2}
    assert len(hidden) == 4 * len(theirs.transformer.blocks)  # qkv, out, gate and up, down
    named = dict(theirs.named_parameters())
    rate = {"lr": 0.02}
    muon = torch.optim.Muon([named[name] for name in hidden], **rate, weight_decay=0.3, momentum=MUON_MOMENTUM,
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    rest = named.keys() - hidden
    decayed = {"head.weight"}
    groups = [{"params": [named[name] for name in names], "weight_decay": decay}
              for names, decay in ((decayed, 0.3), (rest - decayed, 0.0))]  # fmt: skip
    adamw = torch.optim.AdamW(groups, **rate, betas=(0.9, 0.95), fused=True)
    before = values_of(ours)
    for i in range(3):
        step(optimizer, ours, i)
        step(muon, theirs, i)
        adamw.step()
    assert_equal(values_of(ours), values_of(theirs))
    assert all(not torch.equal(before[name], values_of(ours)[name]) for name in named)


def test_a_schedule_reaches_both_parts(make_gpt) -> None:
    gpt = make_gpt()
    optimizer = build_optimizer(gpt, CONFIG)
    step(optimizer, gpt, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = values_of(gpt)
    step(optimizer, gpt, 1)
    assert_equal(values_of(gpt), before)


def test_saved_and_loaded_it_goes_on_as_if_never_stopped(make_gpt) -> None:
    whole, resumed = make_gpt(seed=0), make_gpt(seed=1)
    optimizer = build_optimizer(whole, CONFIG)
    step(optimizer, whole, 0)
    resumed.load_state_dict(whole.state_dict())
    other = build_optimizer(resumed, CONFIG)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for i in (1, 2):
        step(optimizer, whole, i)
        step(other, resumed, i)
    assert_equal(values_of(resumed), values_of(whole))
    states = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert states[0].keys() == states[1].keys() == set(range(len(list(whole.parameters()))))
    for i, parts in states[0].items():
        assert_equal(states[1][i], parts)


def test_a_step_that_is_not_finite_changes_nothing(make_gpt) -> None:
    gpt = make_gpt()
    optimizer = build_optimizer(gpt, CONFIG)
    assert isinstance(optimizer, MuonAndAdamW)
    optimizer.found_inf = torch.zeros(())
    step(optimizer, gpt, 0)
    before = values_of(gpt)
    states = {i: {k: v.clone() for k, v in parts.items()} for i, parts in optimizer.state_dict()["state"].items()}
    optimizer.found_inf.fill_(1.0)
    for p in gpt.parameters():
        p.grad.fill_(torch.nan)
    optimizer.step()
    assert_equal(values_of(gpt), before)
    for i, parts in optimizer.state_dict()["state"].items():
        assert_equal(parts, states[i])


def test_muon_for_what_has_no_transformer_is_an_error(tiny_vq) -> None:
    with pytest.raises(ConfigError, match=r"'muon', which is for the matrices of transformer blocks.*use 'adamw'"):
        build_optimizer(tiny_vq, CONFIG)


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_a_stage_without_a_transformer_refuses_muon_before_anything_is_written(stage: str, train, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"training\.optimizer.*'muon' is for the matrices of transformer blocks"):
        train(stage, "training.optimizer.kind=muon")
    assert not list(tmp_path.glob("runs/*"))
