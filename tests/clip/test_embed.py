import pytest
import torch

from vqt2i.clip import CLIP, embed_images, embed_texts, modality_gap, perturbed, shifted_texts
from vqt2i.text import pad_texts

TEXTS = [(1, 2), (), tuple(range(1, 20)), (1, 2)]


def unit(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@torch.no_grad()
def test_texts_of_any_length_have_the_embeddings_that_they_have_alone(tiny_clip: CLIP) -> None:
    found = embed_texts(tiny_clip, TEXTS)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(found[row], tiny_clip.encode_text(*pad_texts([list(text)], 12))[0])


@torch.no_grad()
def test_images_of_the_scorers_size_are_read_as_they_are_and_others_at_its_size(tiny_clip: CLIP) -> None:
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(embed_images(tiny_clip, image), tiny_clip.encode_image(image))
    doubled = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (embed_images(tiny_clip, doubled) * tiny_clip.encode_image(image)).sum(-1).min() > 0.9


def test_the_gap_of_moved_copies_is_what_they_were_moved_by_and_the_shift_closes_it() -> None:
    image_BE, offset_E = unit(64, 8, 0), torch.eye(8)[0] * 2
    text_BE = shifted_texts(image_BE, offset_E)
    gap = modality_gap(image_BE, text_BE)
    torch.testing.assert_close(gap.shift_E, image_BE.mean(0) - text_BE.mean(0))
    assert gap.distance == gap.shift_E.norm() and gap.distance > 0.5
    torch.testing.assert_close(gap.cosine, (image_BE * text_BE).sum(-1).mean())
    others = [image_BE[i] @ text_BE[j] for i in range(64) for j in range(64) if i != j]
    torch.testing.assert_close(gap.cosine_of_others, torch.stack(others).mean(), rtol=1e-4, atol=1e-5)
    assert gap.shifted_cosine > gap.cosine + 0.2
    moved_BE = shifted_texts(text_BE, gap.shift_E)
    torch.testing.assert_close(gap.shifted_cosine, (image_BE * moved_BE).sum(-1).mean())


def test_no_gap_moves_nothing() -> None:
    image_BE = unit(16, 8, 0)
    gap = modality_gap(image_BE, image_BE)
    assert gap.distance == 0 and gap.cosine == pytest.approx(1) and gap.shifted_cosine == pytest.approx(1)
    torch.testing.assert_close(shifted_texts(image_BE, torch.zeros(8)), image_BE)


@pytest.mark.parametrize("level", [0.0, 0.5, 2.0])
def test_noise_has_the_level_and_a_random_direction(level: float) -> None:
    torch.manual_seed(1)
    clean_BE = unit(2000, 64, 0)
    noisy_BE = perturbed(clean_BE, level)
    torch.testing.assert_close(noisy_BE.norm(dim=-1), torch.ones(2000))
    # a direction at right angles to the embedding, as a random one nearly is, leaves this cosine
    assert (noisy_BE * clean_BE).sum(-1).mean() == pytest.approx((1 + level**2) ** -0.5, abs=0.01)
    assert len({tuple(row) for row in perturbed(clean_BE[:1].expand(5, -1), level).tolist()}) == (5 if level else 1)
