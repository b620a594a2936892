from collections import Counter
from pathlib import Path

import pytest
import torch

from vqt2i.data.images import to_tensor
from vqt2i.data.sampling import Visit
from vqt2i.data.shards import DataSet
from vqt2i.training.batches import Collate, ImageSamples, TokenSamples, training_loader, validation_loader
from vqt2i.training.encode import encode_dataset


@pytest.fixture
def images(tiny_dataset: DataSet, tiny_text) -> ImageSamples:
    return ImageSamples(tiny_dataset.split("train"), 16, tiny_text, seed=0)


@pytest.fixture
def tokens(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> TokenSamples:
    store = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("train", "val"), tmp_path / "store")
    return TokenSamples(store.split("train"), seed=0)


def test_the_store_gives_the_ids_that_the_images_give(images: ImageSamples, tokens: TokenSamples, tiny_vq) -> None:
    for visit in (Visit(index, epoch) for index in range(24) for epoch in range(3)):
        from_image, from_store = images[visit], tokens[visit]
        assert from_image.text_ids == from_store.text_ids and from_image.chance == from_store.chance
        assert torch.equal(tiny_vq.encode(from_image.image[None])[0], from_store.image_ids)


def test_every_caption_in_every_language_is_visited_in_time(images: ImageSamples, tiny_text) -> None:
    seen = Counter(tiny_text.decode(images[Visit(5, epoch)].text_ids) for epoch in range(60))
    captions = {text for texts in images.split.captions(5).values() for text in texts}
    assert set(seen) == captions and min(seen.values()) >= 10


def test_a_visit_is_the_same_whenever_it_is_made(images: ImageSamples) -> None:
    first, again = images[Visit(3, 7)], images[Visit(3, 7)]
    assert first.text_ids == again.text_ids and first.chance == again.chance and torch.equal(first.image, again.image)
    assert images[Visit(3, 8)].chance != first.chance != images[Visit(4, 7)].chance


def test_chances_are_spread_evenly_over_0_to_1(tokens: TokenSamples) -> None:
    chances = torch.tensor([tokens[Visit(index, epoch)].chance for index in range(24) for epoch in range(40)])
    # the deviation of a share p of 960 is at most 0.0162; four of them
    assert all(abs((chances < p).float().mean() - p) < 0.065 for p in (0.1, 0.5, 0.9))
    assert chances.min() >= 0 and chances.max() < 1


def test_a_batch_holds_what_its_samples_hold(images: ImageSamples, tokens: TokenSamples) -> None:
    visits = [Visit(0, 0), Visit(9, 0)]
    samples = [images[visit] for visit in visits]
    batch = Collate(4)(samples)
    assert torch.equal(batch.image[1], to_tensor(images.split[9].image_HW3)) and batch.image_ids is None
    assert batch.text.ids_BS.shape == (2, 4)
    assert batch.text.ids_BS[0].tolist() == (samples[0].text_ids + [0] * 4)[:4]
    assert batch.chance_B.tolist() == pytest.approx([sample.chance for sample in samples])
    stored = Collate(12)([tokens[visit] for visit in visits])
    assert stored.image is None and stored.image_ids.shape == (2, 4, 4) and stored.image_ids.dtype == torch.long
    assert Collate(None)(samples).text is None


def test_images_are_fitted_to_the_size_asked_for(tiny_dataset: DataSet) -> None:
    sample = ImageSamples(tiny_dataset.split("train"), 8, None, seed=0)[Visit(0, 0)]
    assert sample.image.shape == (3, 8, 8) and sample.text_ids == []


@pytest.mark.parametrize("n_workers", [0, 1])
def test_the_loader_goes_on_at_a_step_as_if_it_had_never_stopped(tokens: TokenSamples, n_workers: int) -> None:
    def batches(first_step: int, n_workers: int) -> list:
        return list(training_loader(tokens, batch_size=8, n_steps=7, first_step=first_step, seed=2, text_length=12,
                                    n_workers=n_workers, rank=0, n_ranks=1))  # fmt: skip

    whole, rest = batches(0, 0), batches(4, n_workers)
    assert len(whole) == 7 and len(rest) == 3
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.image_ids, b.image_ids) and torch.equal(a.text.ids_BS, b.text.ids_BS)
        assert torch.equal(a.chance_B, b.chance_B)


@pytest.mark.parametrize("n_samples", [3, 23, 24, 500])
@pytest.mark.parametrize("n_ranks", [1, 2, 5])
def test_validation_is_the_first_samples_in_order_and_every_rank_has_as_many(
    tokens: TokenSamples, n_samples: int, n_ranks: int
) -> None:
    ranks = []
    for rank in range(n_ranks):
        loader = validation_loader(
            tokens, batch_size=4, n_samples=n_samples, text_length=12, rank=rank, n_ranks=n_ranks
        )
        ranks.append([chance for batch in loader for chance in batch.chance_B.tolist()])
    n = max(min(n_samples, 24) // n_ranks, 1)
    assert [len(rank) for rank in ranks] == [n] * n_ranks
    found = [chance for row in zip(*ranks, strict=True) for chance in row]
    assert found == pytest.approx([tokens[Visit(i, 0)].chance for i in range(n * n_ranks)])
