import numpy as np
import pytest

from vqt2i.data.shards import DataSet
from vqt2i.evaluation.memorisation import Nearest, memorisation_rows, nearest_of
from vqt2i.evaluation.reconstruction import batches_of


def test_the_nearest_picture_is_found_in_every_batch() -> None:
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    asked = known[[7, 0, 3]].copy()
    asked[0, 0, 0, 0] ^= 1
    found = nearest_of(asked, iter(np.split(known, [4, 8])))
    assert found.index_N.tolist() == [7, 0, 3]
    assert found.rmse_N == pytest.approx([1 / np.sqrt(48), 0, 0], abs=1e-6)
    everything = np.sqrt(np.square(asked[:, None].astype(float) - known).mean((2, 3, 4)))
    far = nearest_of(255 - asked, iter([known]))
    assert far.rmse_N == pytest.approx(
        np.sqrt(np.square((255 - asked[:, None]).astype(float) - known).mean((2, 3, 4))).min(1), rel=1e-5
    )
    assert found.rmse_N == pytest.approx(everything.min(1), abs=1e-3)


def test_pictures_of_the_training_set_are_told_from_others(tiny_dataset: DataSet) -> None:
    train = tiny_dataset.split("train")
    images = np.concatenate(list(batches_of(train, len(train), 16)))
    texts = [next(iter(train.captions(index).values()))[0] for index in range(len(train))]
    learned = nearest_of(images, batches_of(train, len(train), 16))
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    new = nearest_of(noise, batches_of(train, len(train), 16))
    rows = {(row.name, row.where["pictures"]): row for row in memorisation_rows(texts, learned, train, new)}
    assert rows["nearest_rmse", "drawn"].value == 0 < 20 < rows["nearest_rmse", "held out"].value
    assert rows["own_picture", "drawn"].value == 1 and rows["own_picture", "drawn"].n == len(train)
    moved = Nearest(np.roll(learned.index_N, 1), learned.rmse_N)
    (row,) = [row for row in memorisation_rows(texts, moved, train, None) if row.name == "own_picture"]
    assert row.value < 0.5
    strange = ["no caption"] * len(train)
    assert [row.name for row in memorisation_rows(strange, learned, train, None)] == ["nearest_rmse"]
