"""What every kind of quantizer promises, and what each kind is.

B batch, C channels, H height, W width, N latents, D code width, K ids
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vqt2i.errors import DataError
from vqt2i.vq.autoencoder import ImageTokenizer
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.quantizer import (
    FSQConfig,
    GumbelConfig,
    LFQConfig,
    Quantizer,
    QuantizerConfig,
    ResidualVQConfig,
    VQConfig,
    build_quantizer,
)
from vqt2i.vq.quantizer.gumbel import along_cosine

KINDS: dict[str, QuantizerConfig] = {
    "vq-ema": VQConfig(codebook_size=16, code_dim=4, l2_normalised=False),
    "vq-gradient": VQConfig(codebook_size=16, code_dim=4, update="gradient", codebook_weight=1.0),
    "residual": ResidualVQConfig(codebook_size=8, code_dim=4, depth=3),
    "residual-gradient": ResidualVQConfig(codebook_size=8, code_dim=4, update="gradient", codebook_weight=1.0),
    "fsq": FSQConfig(levels=(4, 5)),
    "lfq": LFQConfig(codebook_size=32),
    "gumbel": GumbelConfig(codebook_size=16),
    "gumbel-hard": GumbelConfig(codebook_size=16, straight_through=True),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def make(config: QuantizerConfig, channels: int = 6) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(config, channels)


def bare(config: QuantizerConfig) -> Quantizer:
    """Its latents are its features."""
    quantizer = make(config)
    quantizer.to_code, quantizer.from_code = torch.nn.Identity(), torch.nn.Identity()
    return quantizer


def features(seed: int = 0, batch: int = 4, channels: int = 6) -> torch.Tensor:
    return torch.randn(batch, channels, 5, 3, generator=torch.Generator().manual_seed(seed))


def as_map(latents_ND: torch.Tensor) -> torch.Tensor:
    return latents_ND.T[None, :, None, :]


@every_kind
def test_forward_equals_encode_then_decode_in_eval_mode(config):
    quantizer = make(config)
    quantizer.train()(features(1))
    out = quantizer.eval()(features())
    assert out.ids_BHW.shape == (4, 5, 3 * config.ids_per_cell) and out.ids_BHW.dtype == torch.long
    assert 0 <= out.ids_BHW.min() and out.ids_BHW.max() < config.vocab_size
    assert torch.equal(out.ids_BHW, quantizer.encode(features()))
    assert out.features_BCHW.shape == (4, 6, 5, 3)
    torch.testing.assert_close(out.features_BCHW, quantizer.decode(out.ids_BHW))


@every_kind
def test_codes_are_what_ids_decode_to(config):
    quantizer = make(config).eval()
    quantizer.from_code = torch.nn.Identity()
    codes_KD = quantizer.codes()
    assert len(codes_KD) == config.vocab_size and codes_KD.dtype == torch.float32
    ids_BHW = torch.randint(config.vocab_size, (2, 3, 4 * config.ids_per_cell))
    cells = ids_BHW.unflatten(2, (4, -1))
    torch.testing.assert_close(quantizer.decode(ids_BHW), codes_KD[cells].sum(3).permute(0, 3, 1, 2))


@every_kind
def test_evaluation_mode_and_encode_change_no_state(config):
    quantizer = make(config)
    quantizer.train()(features())
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    ids = quantizer.encode(features(1))
    assert torch.equal(ids, quantizer.eval()(features(1)).ids_BHW)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


@every_kind
def test_autocast_changes_no_id(config):
    quantizer = make(config).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(features())
    assert out.features_BCHW.dtype == torch.float32
    assert torch.equal(out.ids_BHW, quantizer.encode(features()))


@every_kind
def test_every_parameter_and_the_input_get_a_gradient_in_training(config):
    quantizer, x = make(config).train(), features().requires_grad_()
    out = quantizer(x)
    (out.features_BCHW.square().mean() + out.loss).backward()
    assert [name for name, p in quantizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert x.grad.abs().sum() > 0


@every_kind
def test_the_features_given_back_may_have_another_width(config):
    torch.manual_seed(0)
    quantizer = build_quantizer(config, 6, 10).eval()
    out = quantizer(features())
    assert out.features_BCHW.shape == (4, 10, 5, 3)
    torch.testing.assert_close(out.features_BCHW, quantizer.decode(out.ids_BHW))


@every_kind
def test_in_a_tokenizer_ids_decode_to_the_picture_of_the_forward_pass(config):
    torch.manual_seed(0)
    model = ImageTokenizer(ImageTokenizerConfig(image_size_px=16, channels=(8, 16), quantizer=config)).eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    out = model(x)
    assert out.ids_BHW.shape[1:] == (model.config.grid_height, model.config.grid_width)
    assert torch.equal(out.ids_BHW, model.encode(x))
    torch.testing.assert_close(model.decode(out.ids_BHW), out.reconstruction_B3HW.clamp(-1, 1))


def test_a_part_of_a_cell_is_refused():
    config = ImageTokenizerConfig(quantizer=KINDS["residual"], channels=(8, 16))
    with pytest.raises(DataError, match="a cell has 3 of them side by side, found rows of 4"):
        ImageTokenizer(config).decode(torch.zeros(1, 2, 4, dtype=torch.long))


# residual


def test_each_residual_level_is_the_vector_quantizer_of_what_was_left_over():
    quantizer = bare(KINDS["residual"]).train()
    alone = [bare(KINDS["residual"].level) for _ in range(3)]
    for level, other in zip(quantizer.levels, alone, strict=True):
        other.load_state_dict(level.state_dict())
    x = features(channels=4)
    out, rest, loss = quantizer(x), x, 0.0
    for r, other in enumerate(alone):
        found = other.train()(rest)
        assert torch.equal(out.ids_BHW.unflatten(2, (3, 3))[..., r], found.ids_BHW + 8 * r)
        rest, loss = rest - found.features_BCHW, loss + found.loss
    torch.testing.assert_close(out.features_BCHW, x - rest)
    torch.testing.assert_close(out.loss, loss)
    assert out.n_restarted == 24


def test_more_levels_leave_less_over():
    quantizer = bare(ResidualVQConfig(codebook_size=16, code_dim=4, depth=3))
    x = features(channels=4, batch=32)
    for _ in range(30):
        quantizer.train()(x)
    ids = quantizer.encode(x).unflatten(2, (3, 3))
    codes = quantizer.codes()[ids]
    errors = [float((x - codes[..., : n + 1, :].sum(3).permute(0, 3, 1, 2)).square().mean()) for n in range(3)]
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]


# finite scalars


@pytest.mark.parametrize("levels", [(3,), (4, 5), (8, 6, 5)])
def test_fsq_takes_the_nearest_of_all_grid_points_of_bounded_latents(levels):
    quantizer = bare(FSQConfig(levels=levels))
    latents = torch.randn(2000, len(levels), generator=torch.Generator().manual_seed(0))
    codes = quantizer.codes()
    assert len(codes.unique(dim=0)) == math.prod(levels)
    assert codes.min() == -1 and codes.max() <= 1
    bounded = quantizer._bounded(latents) / torch.tensor(levels).div(2, rounding_mode="floor")
    ids = quantizer.encode(as_map(latents)).flatten()
    assert torch.equal(ids, (bounded[:, None] - codes).square().sum(-1).argmin(-1))
    assert len(ids.unique()) > 0.6 * len(codes)


def test_fsq_passes_the_gradient_of_the_bound():
    quantizer, x = bare(FSQConfig(levels=(5, 5))), torch.tensor([[0.3, -1.2]]).requires_grad_()
    quantizer(as_map(x)).features_BCHW.sum().backward()
    reach = 2 * (1 + 1e-3) / 2  # of a code: half of the levels times the margin, over half of the levels
    torch.testing.assert_close(x.grad, reach * (1 - torch.tanh(x.detach()) ** 2))


# signs


def test_lfq_entropies_equal_those_of_a_softmax_over_all_codes():
    quantizer = bare(LFQConfig(codebook_size=32, temperature=2.0, commitment_weight=0.0, entropy_weight=1.0))
    latents = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = torch.cdist(latents, quantizer.codes().double()).square()
    soft = (-distances / 2.0).softmax(-1)
    each, of_mean = torch.special.entr(soft).sum(-1).mean(), torch.special.entr(soft.mean(0)).sum()
    out = quantizer(as_map(latents.float()))
    assert out.measures["entropy_each"].item() == pytest.approx(each.item(), rel=1e-5)
    assert out.measures["entropy_of_mean"].item() == pytest.approx(of_mean.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx((each - of_mean).item(), rel=1e-4)


def test_lfq_of_18_bits_has_finite_gradients_where_its_choice_is_clear():
    quantizer = bare(LFQConfig(codebook_size=2**18))
    x = (3 * torch.randn(64, 18)).requires_grad_()
    quantizer(as_map(x)).loss.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


# Gumbel


def test_temperature_and_kl_weight_go_along_their_cosines():
    assert [along_cosine(1.0, 0.5, share) for share in (0, 0.5, 1, 7)] == pytest.approx([1, 0.75, 0.5, 0.5])
    config = GumbelConfig(codebook_size=16, anneal_share=0.5, kl_weight=2.0, kl_warmup_share=0.1)
    quantizer = make(config).train()
    outs = {progress: quantizer(features(), progress) for progress in (0.0, 0.05, 0.25, 0.5, 1.0)}
    told = [float(out.measures["temperature"]) for out in outs.values()]
    middle = (1 + 1 / 16) / 2
    assert told == pytest.approx([1, along_cosine(1, 1 / 16, 0.1), middle, 1 / 16, 1 / 16])
    weights = [(out.loss / out.measures["kl"]).item() for out in outs.values()]
    assert weights == pytest.approx([0, 1, 2, 2, 2])
    at_once = make(config.model_copy(update={"kl_warmup_share": 0.0})).train()
    assert (lambda out: out.loss / out.measures["kl"])(at_once(features(), 0.0)).item() == pytest.approx(2)


def test_kl_is_the_divergence_from_the_uniform_prior():
    quantizer = bare(GumbelConfig(codebook_size=4))
    assert quantizer(as_map(torch.zeros(3, 4))).measures["kl"].item() == pytest.approx(0)
    sure = torch.tensor([[50.0, 0, 0, 0], [0, 0, 0, 50.0]])
    assert quantizer(as_map(sure)).measures["kl"].item() == pytest.approx(math.log(4))


def test_gumbel_samples_follow_the_posterior_and_cool_to_single_codes():
    quantizer = bare(GumbelConfig(codebook_size=4, final_temperature=1e-3)).train()
    quantizer.codebook.data = torch.eye(4)
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    mixtures = quantizer(as_map(logits.expand(20_000, 4)), 1.0).features_BCHW[0, :, 0]
    assert mixtures.max(0).values.mean() > 0.99  # nearly one-hot
    torch.testing.assert_close(mixtures.mean(1), logits.softmax(-1), atol=0.02, rtol=0)
    warm = quantizer(as_map(logits.expand(1000, 4)), 0.0).features_BCHW[0, :, 0]
    assert warm.max(0).values.mean() < 0.9


def test_straight_through_reads_one_code_with_the_gradient_of_the_mixture():
    grads = []
    for hard in (False, True):
        quantizer = bare(GumbelConfig(codebook_size=4, straight_through=hard)).train()
        quantizer.codebook.data = torch.eye(4)
        x = torch.zeros(50, 4).requires_grad_()
        torch.manual_seed(1)
        out = quantizer(as_map(x), 0.0).features_BCHW
        (out * torch.arange(200.0).view(1, 4, 1, 50)).sum().backward()
        grads.append(x.grad)
    assert set(out.detach().round(decimals=5).flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(*grads)


# ranks


def two_rank_states(x_per_step: list[torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """State after training steps of the kinds that read all ranks, and the gradient of the first step's loss."""
    often = {"usage_decay": 0.5, "restart_below": 0.6}  # so that codes restart all the time
    configs = {
        "residual": KINDS["residual"].model_copy(update=often),
        "residual-gradient": KINDS["residual-gradient"].model_copy(update=often),
        "lfq": KINDS["lfq"].model_copy(update={"temperature": 1.0}),
    }
    found = {}
    for name, config in configs.items():
        quantizer = make(config).train()
        first = quantizer(x_per_step[0]).loss
        (gradient,) = torch.autograd.grad(first, quantizer.to_code.weight)
        for x in x_per_step[1:]:
            quantizer(x)
        found[name] = {**quantizer.state_dict(), "gradient": gradient}
    return found


def test_two_ranks_keep_what_one_process_keeps_over_the_joint_batch(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, alone in two_rank_states([features(seed) for seed in range(4)]).items():
        gradients = [rank[name].pop("gradient") for rank in ranks]
        torch.testing.assert_close(sum(gradients) / 2, alone.pop("gradient"), msg=name)  # as DDP does
        for key, tensor in alone.items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key]), (name, key)
            torch.testing.assert_close(ranks[0][name][key], tensor)


def train_one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    states = two_rank_states([features(seed)[2 * rank : 2 * rank + 2] for seed in range(4)])
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # a rank of the test above
    train_one_rank(int(sys.argv[1]), Path(sys.argv[2]))
