"""The token store: a data set as ids, memory-mapped, in random access.

store.json                fingerprints of the data set and both tokenizers, grid, splits
SPLIT.image_ids.npy       (samples, grid height, grid width), codes from 0
SPLIT.text_ids.npy        all captions one after the other, whole (a reader truncates)
SPLIT.text_ends.npy       (captions,) where each caption ends in text_ids
SPLIT.caption_ends.npy    (samples,) where each sample's captions end in text_ends
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from vqt2i.config import Config, build_config
from vqt2i.errors import ConfigError, DataError

SPEC_NAME = "store.json"
_ARRAYS = ("image_ids", "text_ids", "text_ends", "caption_ends")


class StoreSpec(Config):
    """What `store.json` says; `dataset`, `image_tokenizer` and `text_tokenizer` are fingerprints."""

    format_version: Literal[1] = 1
    dataset: str
    image_tokenizer: str
    text_tokenizer: str
    grid_height: PositiveInt
    grid_width: PositiveInt
    splits: dict[str, PositiveInt]


class TokenSplit:
    """`split.image_ids(i)` and `split.texts(i)` of one split."""

    def __init__(self, folder: Path, name: str, n_samples: int) -> None:
        try:
            arrays = [np.load(folder / f"{name}.{array}.npy", mmap_mode="r") for array in _ARRAYS]
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{folder}: damaged token store ({error}); remove it and encode again") from None
        self._image_ids, self._text_ids, self._text_ends, self._caption_ends = arrays
        if not len(self._image_ids) == len(self._caption_ends) == n_samples:
            raise DataError(f"{folder}: '{name}' holds {len(self._image_ids)} samples, {SPEC_NAME} says {n_samples}; "
                            "remove it and encode again")  # fmt: skip

    def __len__(self) -> int:
        return len(self._image_ids)

    def image_ids(self, index: int) -> np.ndarray:
        """int64 (grid height, grid width)."""
        return self._image_ids[index].astype(np.int64)

    def texts(self, index: int) -> list[list[int]]:
        """Ids of every caption of sample `index`, all languages."""
        first, last = self._span(self._caption_ends, index)
        return [self._text_ids[slice(*self._span(self._text_ends, i))].tolist() for i in range(first, last)]

    @staticmethod
    def _span(ends: np.ndarray, index: int) -> tuple[int, int]:
        return (int(ends[index - 1]) if index else 0), int(ends[index])


class TokenStore:
    """A store folder, opened."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        self.folder, self.spec = folder, spec

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Raises DataError where there is no readable `store.json`."""
        path = Path(folder) / SPEC_NAME
        try:
            spec = build_config(StoreSpec, json.loads(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError, ConfigError) as error:
            raise DataError(f"{path}: cannot be read as a token store ({error}); "
                            "make one with tools/encode_dataset.py") from None  # fmt: skip
        return cls(Path(folder), spec)

    def split(self, name: str) -> TokenSplit:
        if name not in self.spec.splits:
            raise DataError(f"{self.folder}: no split '{name}'; it has {', '.join(self.spec.splits)}")
        return TokenSplit(self.folder, name, self.spec.splits[name])


class TokenSplitWriter:
    """Collects one split: image ids into a memory-mapped array, captions in memory (a few bytes each)."""

    def __init__(self, folder: Path, name: str, n_samples: int, grid: tuple[int, int], n_image_ids: int) -> None:
        self._folder, self._name, self._row = folder, name, 0
        dtype = np.uint16 if n_image_ids <= 2**16 else np.int32
        path = folder / f"{name}.image_ids.npy"
        self._image_ids = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n_samples, *grid))
        self._texts: list[list[int]] = []
        self._caption_ends: list[int] = []

    def add(self, image_ids_BHW: np.ndarray, texts_B: Iterable[list[list[int]]]) -> None:
        """Append a batch of samples: codes and every caption's ids."""
        self._image_ids[self._row : self._row + len(image_ids_BHW)] = image_ids_BHW
        self._row += len(image_ids_BHW)
        for texts in texts_B:
            self._texts.extend(texts)
            self._caption_ends.append(len(self._texts))

    def finish(self) -> None:
        self._image_ids.flush()
        ids = np.array([i for text in self._texts for i in text], np.int32)
        ends = np.cumsum([len(text) for text in self._texts], dtype=np.int64)
        arrays = (ids, ends, np.array(self._caption_ends, np.int64))
        for array_name, array in zip(_ARRAYS[1:], arrays, strict=True):
            np.save(self._folder / f"{self._name}.{array_name}.npy", array)
