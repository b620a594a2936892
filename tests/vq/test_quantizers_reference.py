"""Ours beside those of `vector-quantize-pytorch`: the same codebook and inputs give the same ids, codes, losses,
gradients and updates."""

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as reference
from torch import Tensor, nn

from vqt2i.vq.quantizer import FSQConfig, LFQConfig, Quantizer, ResidualVQConfig, VQConfig, build_quantizer

K, D, N = 24, 4, 200


def bare(config: object) -> Quantizer:
    """Its latents are its features."""
    torch.manual_seed(0)
    quantizer = build_quantizer(config, 1)
    quantizer.to_code, quantizer.from_code = nn.Identity(), nn.Identity()
    return quantizer.train()


def latents(width: int = D, seed: int = 1) -> Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed))


def as_map(latents_ND: Tensor) -> Tensor:
    return latents_ND.T[None, :, None, :]


def as_rows(features_1D1N: Tensor) -> Tensor:
    return features_1D1N[0, :, 0].T


def run_both(ours: Quantizer, theirs: nn.Module, x_ND: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """ids, codes, loss, and the gradient at the latents of codes and loss, of each."""
    probe_ND, found = latents(x_ND.shape[1], seed=2), []
    for is_ours in (True, False):
        x = x_ND.clone().requires_grad_()
        if is_ours:
            out = ours(as_map(x))
            ids, codes, loss = out.ids_BHW[0, 0], as_rows(out.features_BCHW), out.loss
        else:
            codes, ids, loss = (part[0] if part.ndim > 1 else part.sum() for part in theirs(x[None]))
        # FSQ's loss is a constant
        total = (codes * probe_ND).sum() + (loss if loss.requires_grad else 0)
        found.append((ids.flatten(), codes, loss, torch.autograd.grad(total, x)[0]))
    return tuple(found)


def assert_same(mine: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    assert torch.equal(mine[0], others[0].long())
    for a, b in zip(mine[1:], others[1:], strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-5, atol=2e-6)


def start_alike(ours: Quantizer, theirs: nn.Module, normalised: bool = False) -> None:
    """The codebook of theirs; both have seen an even use of all codes."""
    book = theirs._codebook
    codes = torch.randn(K, D, generator=torch.Generator().manual_seed(3))
    codes = F.normalize(codes, dim=-1) if normalised else codes
    for tensor in (book.embed, book.embed_avg, ours.codebook):
        tensor.data.copy_(codes)
    if hasattr(ours, "latent_sums"):
        # they count latents, and ours shares of an even use
        ours.usage.fill_(K / N)
        ours.latent_sums.copy_(codes * K / N)


@pytest.mark.parametrize("normalised", [False, True])
def test_vq_with_ema_quantizes_and_moves_its_codes_alike(normalised):
    config = VQConfig(codebook_size=K, code_dim=D, l2_normalised=normalised, usage_decay=0.8, restart_below=0.0)
    ours = bare(config)
    theirs = reference.VectorQuantize(
        dim=D, codebook_size=K, decay=0.8, eps=1e-12, commitment_weight=0.25, rotation_trick=False,
        use_cosine_sim=normalised,
    ).train()  # fmt: skip
    start_alike(ours, theirs, normalised)
    for step in range(3):
        assert_same(*run_both(ours, theirs, latents(seed=step)))
        torch.testing.assert_close(ours.codes(), theirs._codebook.embed[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.usage * N / K, theirs._codebook.cluster_size[0], rtol=1e-4, atol=1e-5)


def test_vq_with_gradient_pulls_codes_and_latents_alike():
    # one loss of theirs moves both, so the two weights of ours are one
    ours = bare(VQConfig(codebook_size=K, code_dim=D, l2_normalised=False, update="gradient", codebook_weight=0.5,
                         commitment_weight=0.5, restart_below=0.0))  # fmt: skip
    theirs = reference.VectorQuantize(
        dim=D, codebook_size=K, learnable_codebook=True, ema_update=False, commitment_weight=0.5, rotation_trick=False
    ).train()
    start_alike(ours, theirs)
    x = latents()
    ours(as_map(x)).loss.backward()
    theirs(x[None])[2].sum().backward()
    torch.testing.assert_close(ours.codebook.grad, theirs._codebook.embed.grad[0])
    mine, others = run_both(ours, theirs, x)
    torch.testing.assert_close(mine[2], 2 * others[2])
    assert_same((*mine[:2], mine[3]), (*others[:2], others[3]))


def test_residual_vq_quantizes_and_moves_its_codes_alike():
    ours = bare(ResidualVQConfig(codebook_size=K, code_dim=D, depth=3, usage_decay=0.8, restart_below=0.0))
    theirs = reference.ResidualVQ(
        dim=D, codebook_size=K, num_quantizers=3, decay=0.8, eps=1e-12, commitment_weight=0.25, rotation_trick=False
    ).train()
    for level, other in zip(ours.levels, theirs.layers, strict=True):
        start_alike(level, other)
    mine, others = run_both(ours, theirs, latents())
    assert_same((mine[0] - torch.arange(3).repeat(N) * K, *mine[1:3]), others[:3])
    # theirs passes the gradient of the codes through each level, three times in all; ours once, as RQ-VAE does
    torch.testing.assert_close(mine[3] + 2 * latents(seed=2), others[3], rtol=1e-4, atol=1e-5)
    for level, other in zip(ours.levels, theirs.layers, strict=True):
        torch.testing.assert_close(level.codes(), other._codebook.embed[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [(5, 3, 7), (8, 5, 5), (4, 6)])
def test_fsq_quantizes_alike(levels):
    ours, theirs = bare(FSQConfig(levels=levels)), reference.FSQ(list(levels)).train()
    x = latents(len(levels))
    mine, (ids, codes, *_) = run_both(ours, lambda x: (*theirs(x), torch.zeros(())), x)
    assert_same(mine[:2], (ids, codes))
    assert_same(*run_both(ours, lambda x: (*theirs(x), torch.zeros(())), x))
    torch.testing.assert_close(ours.codes(), theirs.implicit_codebook)


def test_lfq_quantizes_alike_with_the_same_entropy_loss():
    config = LFQConfig(codebook_size=32, commitment_weight=0.25, entropy_weight=0.1, diversity=0.7, temperature=2.0)
    ours = bare(config)
    theirs = reference.LFQ(
        codebook_size=32, commitment_loss_weight=0.25, entropy_loss_weight=0.1, diversity_gamma=0.7
    ).train()
    assert_same(*run_both(ours, lambda x: theirs(x, inv_temperature=0.5), latents(5)))
    torch.testing.assert_close(ours.codes(), theirs.codebook)
    _, parts = theirs(latents(5)[None], inv_temperature=0.5, return_loss_breakdown=True)
    told = ours(as_map(latents(5))).measures
    torch.testing.assert_close(told["entropy_each"], parts.per_sample_entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told["entropy_of_mean"], parts.batch_entropy, rtol=1e-4, atol=1e-5)
