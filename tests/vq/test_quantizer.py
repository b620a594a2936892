"""The learned codebook; what it shares with the other kinds is in test_quantizers.py.

B batch, C channels, H height, W width, N latents, D code width, K codes
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vqt2i.vq.quantizer import VectorQuantizer, VQConfig, build_quantizer, codebook, nearest_codes

EMA = VQConfig(codebook_size=16, code_dim=4)
GRADIENT = VQConfig(codebook_size=16, code_dim=4, update="gradient", codebook_weight=1.0)


def make(config: VQConfig, channels: int = 6) -> VectorQuantizer:
    torch.manual_seed(0)
    return build_quantizer(config, channels)


def features(seed: int = 0, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 6, 5, 3, generator=torch.Generator().manual_seed(seed))


def latents_of(quantizer: VectorQuantizer, x_BCHW: torch.Tensor) -> torch.Tensor:
    z = quantizer.to_code(x_BCHW).permute(0, 2, 3, 1).reshape(-1, quantizer.config.code_dim).detach()
    return F.normalize(z, dim=-1) if quantizer.config.l2_normalised else z


def test_nearest_codes_equal_brute_force(monkeypatch):
    torch.manual_seed(0)
    latents, codes = torch.randn(200, 8), torch.randn(50, 8)
    expected = torch.tensor([min(range(50), key=lambda k: float((z - codes[k]).square().sum())) for z in latents])
    assert torch.equal(nearest_codes(latents, codes), expected)
    monkeypatch.setattr(codebook, "MAX_SCORES", 50 * 7)  # in parts of 7 latents
    assert torch.equal(nearest_codes(latents, codes), expected)


@pytest.mark.parametrize("n_codes, share", [(512, 0.022), (8192, 0.050)])
def test_search_in_bf16_would_choose_other_codes(n_codes, share):
    torch.manual_seed(0)
    latents, codes = F.normalize(torch.randn(4096, 8), dim=-1), F.normalize(torch.randn(n_codes, 8), dim=-1)
    in_bf16 = (latents.bfloat16() @ codes.bfloat16().T).argmax(-1)
    differ = (in_bf16 != nearest_codes(latents, codes)).float().mean()
    assert differ.item() == pytest.approx(share, rel=0.3)  # measured; the accumulation order is the machine's


@pytest.mark.parametrize("config", [EMA, GRADIENT])
def test_gradient_passes_straight_through_to_the_latents(config):
    quantizer = make(config).eval()
    latents = torch.randn(1, 4, 2, 2)
    quantizer.to_code, quantizer.from_code = torch.nn.Identity(), torch.nn.Identity()
    x = F.normalize(latents, dim=1).requires_grad_()
    weights = torch.randn(1, 4, 2, 2)
    (grad,) = torch.autograd.grad((quantizer(x).features_BCHW * weights).sum(), x)
    # through the normalisation, which on the unit sphere projects out the radial part
    expected = weights - (weights * x.detach()).sum(1, keepdim=True) * x.detach()
    torch.testing.assert_close(grad, expected)


def test_ema_update_equals_hand_computed():
    config = VQConfig(codebook_size=2, code_dim=1, l2_normalised=False, usage_decay=0.9, restart_below=0.0)
    quantizer = VectorQuantizer(config, 1)
    quantizer.to_code = torch.nn.Identity()
    quantizer.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    quantizer.usage.fill_(1.0)
    quantizer.latent_sums.copy_(quantizer.codebook)
    quantizer.train()(torch.tensor([1.0, 2.0, 3.0, 8.0]).view(1, 1, 2, 2))
    # shares of an even use (2 of 4 latents each): 3 / 2 and 1 / 2
    torch.testing.assert_close(quantizer.usage, torch.tensor([0.9 + 0.1 * 1.5, 0.9 + 0.1 * 0.5]))
    expected = [(0.1 * 6 / 2) / (0.9 + 0.15), (0.9 * 10 + 0.1 * 8 / 2) / (0.9 + 0.05)]
    torch.testing.assert_close(quantizer.codebook, torch.tensor(expected)[:, None])


def test_losses_equal_hand_computed():
    for config in (
        VQConfig(codebook_size=2, code_dim=1, l2_normalised=False, commitment_weight=0.5),
        VQConfig(codebook_size=2, code_dim=1, l2_normalised=False, commitment_weight=0.5,
                 update="gradient", codebook_weight=2.0),
    ):  # fmt: skip
        quantizer = VectorQuantizer(config, 1).eval()
        quantizer.to_code = torch.nn.Identity()
        quantizer.codebook.data.copy_(torch.tensor([[0.0], [10.0]]))
        x = torch.tensor([1.0, 7.0]).view(1, 1, 1, 2).requires_grad_()
        loss = quantizer(x).loss
        squared = (1 + 9) / 2
        assert loss.item() == pytest.approx((0.5 + (config.codebook_weight or 0)) * squared)
        loss.backward()
        assert x.grad.flatten().tolist() == pytest.approx([0.5 * 1, 0.5 * -3])  # commitment only: d mean / dx
        if config.codebook_weight:
            assert quantizer.codebook.grad.flatten().tolist() == pytest.approx([2.0 * -1, 2.0 * 3])


def test_codebook_is_a_buffer_with_ema_and_a_parameter_with_gradient():
    assert "codebook" in dict(make(EMA).named_buffers())
    assert "codebook" in dict(make(GRADIENT).named_parameters())


@pytest.mark.parametrize("config", [EMA, GRADIENT])
def test_first_training_batch_initialises_every_code_from_latents(config):
    quantizer = make(config)
    x = features()
    latents = latents_of(quantizer, x)
    quantizer._restart_dead_codes(latents)
    distances = torch.cdist(quantizer.codes().detach(), latents)
    assert distances.min(dim=1).values.max() < 1e-3
    assert len(torch.unique(distances.argmin(dim=1))) == config.codebook_size  # drawn without repetition


@pytest.mark.parametrize("config", [EMA, GRADIENT])
def test_dead_codes_come_back_to_use(config):
    quantizer = make(config.model_copy(update={"usage_decay": 0.8}))
    quantizer.codebook.data.copy_(F.normalize(torch.randn(1, 4), dim=-1) + 1e-4 * torch.randn(16, 4))  # collapsed
    quantizer.usage.fill_(1.0)
    if config.update == "ema":
        quantizer.latent_sums.copy_(quantizer.codebook)
    x = features(batch=32)
    never = make(config.model_copy(update={"usage_decay": 0.8, "restart_below": 0.0}))
    never.load_state_dict(quantizer.state_dict())
    for module in (quantizer, never):
        for _ in range(100):
            module.train()(x)
    used, used_without_restart = (len(m.eval()(x).ids_BHW.unique()) for m in (quantizer, never))
    assert used == 16
    if config.update == "gradient":  # no optimizer step here: without restarts nothing moves
        assert used_without_restart < 16


def test_restarts_avoid_latents_that_have_a_code_already():
    quantizer = make(VQConfig(codebook_size=2, code_dim=2, l2_normalised=False), channels=1)
    quantizer.codebook.copy_(torch.tensor([[1.0, 0.0], [50.0, 50.0]]))
    quantizer.usage.copy_(torch.tensor([1.0, 0.0]))
    background, rare = torch.tensor([1.0, 0.0]).expand(999, 2), torch.tensor([[0.0, 3.0]])
    quantizer._restart_dead_codes(torch.cat([background, rare]))
    assert quantizer.codebook.tolist() == [[1.0, 0.0], [0.0, 3.0]]


@pytest.mark.parametrize("config", [EMA, GRADIENT])
def test_latents_that_are_not_finite_do_not_stop_a_restart_nor_become_codes(config):
    quantizer = make(config)  # all codes are dead
    latents = latents_of(quantizer, features())
    latents[::2] = float("nan")
    quantizer._restart_dead_codes(latents)
    assert quantizer.codebook.isfinite().all()


def test_more_dead_codes_than_latents_restart_as_far_as_they_reach():
    quantizer = make(VQConfig(codebook_size=64, code_dim=4))
    quantizer.train()(features(batch=1))  # 15 latents
    assert int((quantizer.usage > 0).sum()) == 15


@pytest.mark.parametrize("config", [EMA, GRADIENT])
def test_restored_state_continues_exactly(config):
    quantizer, other = make(config), make(config)
    for seed in range(3):
        quantizer.train()(features(seed))
    other.load_state_dict(quantizer.state_dict())
    quantizer.usage[::2] = other.usage[::2] = 0.0  # so that the draw of restarts is part of the claim
    for module in (quantizer, other):
        module.train()(features(7))
    assert all(torch.equal(quantizer.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def train_steps(config: VQConfig, x_per_step: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    quantizer = make(config).train()
    for x in x_per_step:
        quantizer(x)
    return quantizer.state_dict()


def two_rank_configs() -> dict[str, VQConfig]:
    often = {"usage_decay": 0.5, "restart_below": 0.6}  # so that codes restart all the time
    return {"ema": EMA.model_copy(update=often), "gradient": GRADIENT.model_copy(update=often)}


def test_two_ranks_keep_the_codebook_of_one_process_over_the_joint_batch(tmp_path):
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, config in two_rank_configs().items():
        alone = train_steps(config, [features(seed) for seed in range(8)])
        for key, tensor in alone.items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key]), (name, key)
            torch.testing.assert_close(ranks[0][name][key], tensor)


def train_one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    share = slice(2 * rank, 2 * rank + 2)
    batches = [features(seed)[share] for seed in range(8)]
    states = {name: train_steps(config, batches) for name, config in two_rank_configs().items()}
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # a rank of the test above
    train_one_rank(int(sys.argv[1]), Path(sys.argv[2]))
