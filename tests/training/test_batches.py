from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.data.images import fit_variant, to_tensor
from vqt2i.data.sampling import Visits
from vqt2i.data.shards import DataSet
from vqt2i.errors import DataError
from vqt2i.text.train import TextTokenizerConfig, train_text_tokenizer
from vqt2i.training.batches import (
    Batch,
    BatchLoader,
    ImageSamples,
    MixedSamples,
    TokenSamples,
    training_loader,
    validation_loader,
)
from vqt2i.training.encode import encode_dataset

ALL = Visits(*(part.reshape(-1) for part in np.mgrid[0:24, 0:3]))  # 24 samples in 3 epochs


def visits(*pairs: tuple[int, int]) -> Visits:
    return Visits(*np.array(pairs).T)


def equal(a: Batch, b: Batch) -> bool:
    def parts(batch: Batch) -> list:
        return [batch.image, batch.image_ids, batch.chance_B, *(batch.text or ())]

    return all(x is y is None or torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


@pytest.fixture
def images(tiny_dataset: DataSet, tiny_text) -> ImageSamples:
    return ImageSamples(tiny_dataset.split("train"), 16, tiny_text, seed=0)


@pytest.fixture
def tokens(tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> TokenSamples:
    store = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("train", "val"), tmp_path / "store")
    return TokenSamples(store.split("train"), seed=0)


@pytest.mark.parametrize("variants", ["centre", "ten-crop"])
def test_the_store_gives_the_ids_that_the_images_give(
    variants: str, tiny_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path
) -> None:
    store = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("train",), tmp_path / "store", variants=variants)
    images = ImageSamples(tiny_dataset.split("train"), 16, tiny_text, 3, variants)
    tokens = TokenSamples(store.split("train"), 3)
    for augment in (True, False):
        from_images, from_store = (source.batch(ALL, 12, augment=augment) for source in (images, tokens))
        assert torch.equal(from_images.text.ids_BS, from_store.text.ids_BS)
        assert torch.equal(from_images.text.n_ids_B, from_store.text.n_ids_B)
        assert torch.equal(from_images.chance_B, from_store.chance_B)
        assert torch.equal(tiny_vq.encode(from_images.image), from_store.image_ids)


def test_every_variant_is_drawn_in_training_and_the_first_alone_in_validation(tiny_dataset: DataSet) -> None:
    source = ImageSamples(tiny_dataset.split("train"), 16, None, seed=0, variants="ten-crop")
    pair, looks = source.split[5], visits(*((5, epoch) for epoch in range(200)))
    crops = [to_tensor(fit_variant(pair.image_HW3, 16, "ten-crop", i)) for i in range(10)]
    seen = Counter(next(i for i, crop in enumerate(crops) if torch.equal(image, crop))
                   for image in source.batch(looks, None, augment=True).image)  # fmt: skip
    assert sorted(seen) == list(range(10)) and min(seen.values()) >= 5
    assert all(torch.equal(image, crops[0]) for image in source.batch(looks, None, augment=False).image)


def test_every_caption_in_every_language_is_visited_in_time(images: ImageSamples, tiny_text) -> None:
    text = images.batch(visits(*((5, epoch) for epoch in range(60))), 12, augment=True).text
    seen = Counter(tiny_text.decode(ids[:n].tolist()) for ids, n in zip(*text, strict=True))
    captions = {text for texts in images.split.captions(5).values() for text in texts}
    assert set(seen) == captions and min(seen.values()) >= 10


def test_a_visit_is_the_same_whatever_is_visited_with_it(images: ImageSamples, tokens: TokenSamples) -> None:
    for source in (images, tokens):
        alone = source.batch(visits((3, 7)), 12, augment=True)
        together = source.batch(visits((8, 0), (3, 7), (3, 8)), 12, augment=True)
        for a, b in zip(alone[:2], together[:2], strict=True):
            assert a is b is None or torch.equal(a[0], b[1])
        assert torch.equal(alone.text.ids_BS[0], together.text.ids_BS[1])
        assert alone.chance_B[0] == together.chance_B[1] != together.chance_B[2]


def test_a_batch_holds_what_its_samples_hold(images: ImageSamples, tokens: TokenSamples, tiny_text) -> None:
    batch = images.batch(visits((0, 0), (9, 0)), 4, augment=True)
    assert torch.equal(batch.image[1], to_tensor(images.split[9].image_HW3)) and batch.image_ids is None
    assert batch.text.ids_BS.shape == (2, 4) and batch.chance_B.dtype == torch.float32
    captions = [tiny_text.encode(text) for texts in images.split.captions(9).values() for text in texts]
    assert batch.text.ids_BS[1].tolist() in [(ids + [0] * 4)[:4] for ids in captions]
    stored = tokens.batch(visits((0, 0), (9, 0)), 12, augment=True)
    assert stored.image is None and stored.image_ids.shape == (2, 4, 4) and stored.image_ids.dtype == torch.long
    assert images.batch(visits((0, 0)), None, augment=True).text is None
    assert tokens.batch(visits((0, 0)), None, augment=True).text is None


def test_images_are_fitted_to_the_size_asked_for(tiny_dataset: DataSet) -> None:
    batch = ImageSamples(tiny_dataset.split("train"), 8, None, seed=0).batch(visits((0, 0)), 3, augment=True)
    assert batch.image.shape == (1, 3, 8, 8) and batch.text.n_ids_B.tolist() == [0]


def test_a_mixed_batch_holds_what_its_sources_hold(
    images: ImageSamples, tokens: TokenSamples, tiny_dataset: DataSet, tiny_text
) -> None:
    others = ImageSamples(tiny_dataset.split("val"), 16, tiny_text, seed=0)
    mixed = MixedSamples(images, others, 0.5).batch(visits((3, 1), (24, 0), (9, 2), (30, 5)), 12, augment=True)
    for source, rows, looks in ((images, [0, 2], [(3, 1), (9, 2)]), (others, [1, 3], [(0, 0), (6, 5)])):
        alone = source.batch(visits(*looks), 12, augment=True)
        text = type(mixed.text)(*(part[rows] for part in mixed.text))
        assert equal(alone, Batch(mixed.image[rows], None, text, mixed.chance_B[rows]))
    one_source = MixedSamples(tokens, tokens, 0.5).batch(visits((30, 0), (24, 3)), None, augment=True)
    assert equal(one_source, tokens.batch(visits((6, 0), (0, 3)), None, augment=True))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_the_loader_goes_on_at_a_step_as_if_it_had_never_stopped(tokens: TokenSamples, n_workers: int) -> None:
    def batches(first_step: int, n_workers: int) -> list[Batch]:
        return list(training_loader(tokens, batch_size=8, n_steps=7, first_step=first_step, seed=2, text_length=12,
                                    n_workers=n_workers, rank=0, n_ranks=1))  # fmt: skip

    whole, rest = batches(0, 0), batches(4, n_workers)
    assert len(whole) == 7 and len(rest) == 3
    assert all(equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_any_number_of_ranks_makes_the_same_global_batch(tokens: TokenSamples, n_ranks: int) -> None:
    def batches(rank: int, n_ranks: int) -> list[Batch]:
        return list(training_loader(tokens, batch_size=8, n_steps=5, first_step=0, seed=2, text_length=12,
                                    n_workers=0, rank=rank, n_ranks=n_ranks))  # fmt: skip

    for whole, *shares in zip(batches(0, 1), *(batches(rank, n_ranks) for rank in range(n_ranks)), strict=True):
        for rank, share in enumerate(shares):
            assert torch.equal(share.image_ids, whole.image_ids[rank::n_ranks])
            assert torch.equal(share.text.ids_BS, whole.text.ids_BS[rank::n_ranks])
            assert torch.equal(share.chance_B, whole.chance_B[rank::n_ranks])


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
    expected = visits(*((i, 0) for i in range(n * n_ranks)))
    assert found == tokens.batch(expected, None, augment=False).chance_B.tolist()


def refuse(key: int) -> int:
    if key == 1:
        raise DataError("sample 1 is damaged")
    return key


@pytest.mark.parametrize("n_workers", [0, 2])
def test_what_a_user_can_mend_is_told_as_it_was_raised_in_a_worker(n_workers: int) -> None:
    batches = iter(BatchLoader(refuse, [0, 1, 2], n_workers))
    assert next(batches) == 0
    with pytest.raises(DataError, match=r"\Asample 1 is damaged\Z"):
        next(batches)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_bpe_dropout_is_of_the_visit_alone_the_same_from_images_and_store_and_off_in_validation(
    n_workers: int, tiny_dataset: DataSet, tiny_vq, tmp_path: Path
) -> None:
    captions = [c for i in range(24) for texts in tiny_dataset.split("train").captions(i).values() for c in texts]
    bpe = train_text_tokenizer(captions, TextTokenizerConfig(vocabulary_size=300, model_type="bpe"))
    store = encode_dataset(tiny_dataset, tiny_vq, bpe, ("train",), tmp_path / "store")
    images = ImageSamples(tiny_dataset.split("train"), 16, bpe, 3, bpe_dropout=0.3)
    tokens = TokenSamples(store.split("train"), 3, bpe, bpe_dropout=0.3)
    plain = TokenSamples(store.split("train"), 3)
    read = [
        [source.batch(ALL, 12, augment=augment).text for source in (images, tokens, plain)] for augment in (True, False)
    ]
    (from_images, from_store, undropped), in_validation = read
    assert torch.equal(from_images.ids_BS, from_store.ids_BS) and torch.equal(from_images.n_ids_B, from_store.n_ids_B)
    assert (from_store.n_ids_B > undropped.n_ids_B).float().mean() > 0.3
    assert all(torch.equal(text.ids_BS, in_validation[2].ids_BS) for text in in_validation)
    options = {"batch_size": 8, "n_steps": 6, "first_step": 0, "seed": 0, "text_length": 12, "rank": 0, "n_ranks": 1}
    here, there = (training_loader(tokens, **options, n_workers=n) for n in (0, n_workers))
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))
