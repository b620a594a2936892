"""How near drawn pictures come to pictures that the model was trained on.

N drawn pictures, T training pictures, P = height · width · 3 values of a picture
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vqt2i.data.shards import Split
from vqt2i.evaluation.result import Row
from vqt2i.evaluation.statistics import bootstrap_mean
from vqt2i.text import clean_text


class Nearest(NamedTuple):
    """Of each picture the nearest one of a set: its place there and the root of the mean square of all differences of
    pixel values, of 255, (N,) each."""

    index_N: np.ndarray
    rmse_N: np.ndarray


def nearest_of(image_NHW3: np.ndarray, batches: Iterator[np.ndarray]) -> Nearest:
    """Find the nearest pictures by their pixels. batches: all pictures of the set, uint8 (B, height, width, 3)."""
    picture_NP = image_NHW3.reshape(len(image_NHW3), -1).astype(np.float32)
    square_N = np.square(picture_NP).sum(1)
    index_N, best_N, start = np.zeros(len(picture_NP), int), np.full(len(picture_NP), np.inf), 0
    for batch in batches:
        other_BP = batch.reshape(len(batch), -1).astype(np.float32)
        distance_NB = square_N[:, None] + np.square(other_BP).sum(1) - 2 * picture_NP @ other_BP.T
        found_N = distance_NB.argmin(1)
        nearer_N = distance_NB.min(1) < best_N
        index_N[nearer_N], best_N[nearer_N] = start + found_N[nearer_N], distance_NB.min(1)[nearer_N]
        start += len(batch)
    return Nearest(index_N, np.sqrt(best_N.clip(0) / picture_NP.shape[1]))


def memorisation_rows(texts: Sequence[str], drawn: Nearest, trained: Split, held_out: Nearest | None) -> list[Row]:
    """nearest_rmse: distance to the nearest training picture, of drawn pictures, and as a yardstick of pictures that
    the model has not seen. own_picture: how often the nearest one is a picture of the prompt itself, where the prompts
    are captions of training pictures.

    Args:
        texts: prompts of the drawn pictures, cleaned. held_out: of pictures that were not trained on.
    """
    rows = [Row("nearest_rmse", *bootstrap_mean(drawn.rmse_N), {"pictures": "drawn"})]
    if held_out:
        rows.append(Row("nearest_rmse", *bootstrap_mean(held_out.rmse_N), {"pictures": "held out"}))
    said = [{clean_text(text) for texts in trained.captions(i).values() for text in texts} for i in range(len(trained))]
    known = set().union(*said)
    own = [text in said[index] for text, index in zip(texts, drawn.index_N, strict=True) if text in known]
    if own:
        rows.append(Row("own_picture", *bootstrap_mean(np.array(own, float)), {"pictures": "drawn"}))
    return rows
