"""The token store: a data set as ids, memory-mapped, in random access.

store.json                fingerprints of both tokenizers, grid, variants, the shards that each split was made of
SPLIT.image_ids.npy       (samples, variants, grid height, grid width), codes from 0
SPLIT.low_ids.npy         (samples, variants, grid height / 2, grid width / 2), codes of the images at half their size,
                          where these were asked for; the images have twice the image tokenizer's size then
SPLIT.embeddings.npy      (samples, variants, width), float32: of the images, where a scorer was asked for them
SPLIT.labels.npy          (samples,) the number of each sample's class, of a data set of classes
SPLIT.text_ids.npy        all captions one after the other, whole (a reader truncates)
SPLIT.text_starts.npy     (captions + 1,) where each caption starts in text_ids; the last number is where they end
SPLIT.caption_starts.npy  (samples + 1,) where each sample's captions start in text_starts; likewise

It is made and compared shard by shard, for a data set grows by shards.

B batch, S longest text, N samples, V variants, H W grid, E width of embeddings
"""

import json
import os
import zipfile
from collections.abc import Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from vqt2i.config import Config, build_config
from vqt2i.data.images import Variants, n_variants
from vqt2i.data.shards import SplitSpec
from vqt2i.errors import ConfigError, DataError
from vqt2i.files import write_atomic

SPEC_NAME = "store.json"
_ARRAYS = ("image_ids", "text_ids", "text_starts", "caption_starts")
# arrays that only some stores have, and where a part has them
LOW_IDS, EMBEDDINGS, LABELS = "low_ids", "embeddings", "labels"
_FIELDS = {LOW_IDS: "low_ids_NVHW", EMBEDDINGS: "embeddings_NVE", LABELS: "labels_N"}


class StoreSpec(Config):
    """What `store.json` says; `image_tokenizer`, `text_tokenizer` and `scorer` are fingerprints.

    scorer, embedding_width: of what made the embeddings, where there are any.
    low_resolution: whether the codes of the images at half their size are there.
    languages: of the data set; they decide which captions a sample has. labels: names of its classes, if it has any.
    splits: as in `data.json`; the shards' hashes say what was encoded.
    """

    format_version: Literal[2] = 2
    image_tokenizer: str
    text_tokenizer: str
    scorer: str | None = None
    embedding_width: NonNegativeInt = 0
    low_resolution: bool = False
    languages: tuple[str, ...]
    labels: tuple[str, ...] = ()
    variants: Variants
    grid_height: PositiveInt
    grid_width: PositiveInt
    splits: dict[str, SplitSpec]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(variants, grid height, grid width): the codes of one sample."""
        return n_variants(self.variants), self.grid_height, self.grid_width

    @property
    def optional_arrays(self) -> dict[str, tuple[int, ...]]:
        """Those that only some stores have: what each holds of one sample."""
        n, height, width = self.image_shape
        low = {LOW_IDS: (n, height // 2, width // 2)} if self.low_resolution else {}
        embeddings = {EMBEDDINGS: (n, self.embedding_width)} if self.embedding_width else {}
        return low | embeddings | ({LABELS: ()} if self.labels else {})

    @property
    def shards(self) -> dict[str, tuple[str, int, int]]:
        """Where each shard's samples are, by its hash: split, first sample, and the one behind the last."""
        found = {}
        for name, split in self.splits.items():
            first = 0
            for shard in split.shards:
                found[shard.sha256] = (name, first, first + shard.n_samples)
                first += shard.n_samples
        return found


class TokenPart(NamedTuple):
    """Samples in a row: codes, and all their captions one after the other."""

    image_ids_NVHW: np.ndarray
    text_ids: np.ndarray  # of all captions
    text_lengths: np.ndarray  # of each caption
    n_captions_N: np.ndarray
    embeddings_NVE: np.ndarray = np.zeros((0, 0, 0), np.float32)
    low_ids_NVHW: np.ndarray = np.zeros((0, 0, 0, 0), np.uint16)
    labels_N: np.ndarray = np.zeros(0, np.int64)


def save_part(path: Path, part: TokenPart) -> None:
    """Write a part to one file, atomically."""
    buffer = BytesIO()
    np.savez(buffer, **part._asdict())
    write_atomic(path, buffer.getvalue())


def load_part(path: Path) -> TokenPart:
    """Read what `save_part` wrote.

    Raises:
        DataError: no such file, or a damaged one.
    """
    try:
        with np.load(path) as arrays:
            return TokenPart(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); is another process encoding the same store? "
                        f"Remove {path.parent} and encode again") from None  # fmt: skip


class TokenSplit:
    """One split, read by whole batches. Pickled as its path: a worker process maps the files itself."""

    def __init__(self, folder: Path, name: str, n_samples: int, *, optional: tuple[str, ...] = ()) -> None:
        self._arguments = (folder, name, n_samples, optional)
        try:
            # plain views: indexing np.memmap itself takes several times as long
            arrays = [
                np.asarray(np.load(folder / f"{name}.{array}.npy", mmap_mode="r")) for array in (*_ARRAYS, *optional)
            ]
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{folder}: damaged token store ({error}); remove it and encode again") from None
        self._image_ids, self._text_ids, self._text_starts, self._caption_starts = arrays[:4]
        self._optional = dict(zip(optional, arrays[4:], strict=True))
        lengths = {len(self._image_ids), len(self._caption_starts) - 1, *map(len, self._optional.values())}
        if lengths != {n_samples}:
            raise DataError(f"{folder}: '{name}' holds {len(self._image_ids)} samples, {SPEC_NAME} says {n_samples}; "
                            "remove it and encode again")  # fmt: skip

    def __reduce__(self) -> tuple:
        *place, optional = self._arguments
        return partial(TokenSplit, optional=optional), tuple(place)

    def __len__(self) -> int:
        return len(self._image_ids)

    @property
    def n_variants(self) -> int:
        return self._image_ids.shape[1]

    def image_ids(self, index_B: np.ndarray, variant_B: np.ndarray) -> np.ndarray:
        """Codes of one variant of each sample, int64 (B, H, W)."""
        return self._image_ids[index_B, variant_B].astype(np.int64)

    def low_ids(self, index_B: np.ndarray, variant_B: np.ndarray) -> np.ndarray | None:
        """Codes of one variant of each sample at half its size, int64 (B, H / 2, W / 2), where the store has them."""
        low = self._optional.get(LOW_IDS)
        return None if low is None else low[index_B, variant_B].astype(np.int64)

    def embeddings(self, index_B: np.ndarray, variant_B: np.ndarray) -> np.ndarray | None:
        """The scorer's embedding of one variant of each sample, float32 (B, E), where the store has them."""
        embeddings = self._optional.get(EMBEDDINGS)
        return None if embeddings is None else embeddings[index_B, variant_B]

    def labels(self, index_B: np.ndarray) -> np.ndarray | None:
        """The number of each sample's class, int64 (B,), where the store has them."""
        labels = self._optional.get(LABELS)
        return None if labels is None else labels[index_B]

    def texts(self, index_B: np.ndarray, draw_B: np.ndarray, text_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample the caption that `draw_B` in [0, 1) falls on, of all languages; none where it has none.

        Returns ids, int64 (B, S = `text_length`), truncated or right-padded with zeros, and how many count, (B,).
        """
        start_B, behind_B = self._places(index_B, draw_B)
        n_ids_B = np.minimum(behind_B - start_B, text_length)
        places_S = np.arange(text_length)
        filled_BS = places_S < n_ids_B[:, None]
        ids_BS = np.zeros(filled_BS.shape, np.int64)
        ids_BS[filled_BS] = self._text_ids[(start_B[:, None] + places_S)[filled_BS]]
        return ids_BS, n_ids_B

    def whole_texts(self, index_B: np.ndarray, draw_B: np.ndarray) -> list[list[int]]:
        """The ids that `texts` gives, as many as there are."""
        places = zip(*self._places(index_B, draw_B), strict=True)
        return [self._text_ids[start:behind].tolist() for start, behind in places]

    def _places(self, index_B: np.ndarray, draw_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the ids of the captions that are drawn begin, and where they end."""
        first_B, behind_B = self._caption_starts[index_B], self._caption_starts[index_B + 1]
        caption_B = first_B + (draw_B * (behind_B - first_B)).astype(np.int64)
        next_B = np.minimum(caption_B + 1, behind_B)  # the same where there is no caption
        return self._text_starts[caption_B], self._text_starts[next_B]

    def part(self, first: int, behind: int) -> TokenPart:
        """The samples from `first` up to `behind`, with everything that is known of them."""
        captions = self._caption_starts[first : behind + 1]
        texts = self._text_starts[captions[0] : captions[-1] + 1]
        text_ids = self._text_ids[texts[0] : texts[-1]]
        part = TokenPart(self._image_ids[first:behind], text_ids, np.diff(texts), np.diff(captions))
        more = {_FIELDS[name]: array[first:behind] for name, array in self._optional.items()}
        return part._replace(**more)


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
            raise DataError(f"{path}: cannot be read as a token store ({error}); remove the folder if there is one, "
                            "and make the store with tools/encode_dataset.py") from None  # fmt: skip
        return cls(Path(folder), spec)

    def split(self, name: str) -> TokenSplit:
        if name not in self.spec.splits:
            raise DataError(f"{self.folder}: no split '{name}'; it has {', '.join(self.spec.splits)}")
        return TokenSplit(
            self.folder, name, self.spec.splits[name].n_samples, optional=tuple(self.spec.optional_arrays)
        )


def image_id_dtype(n_image_ids: int) -> type[np.integer]:
    """The smallest of uint16 and int32 that holds ids below `n_image_ids`."""
    return np.uint16 if n_image_ids <= 2**16 else np.int32


def write_split(folder: Path, name: str, parts: Iterable[TokenPart], image_shape: tuple[int, int, int],
                dtype: type[np.integer], optional: dict[str, tuple[int, ...]] | None = None) -> None:  # fmt: skip
    """Write the arrays of one split, holding one part at a time. `image_shape`, `optional`: as in `StoreSpec`."""
    starts = (np.int64, ())
    kinds = dict(zip(_ARRAYS, ((dtype, image_shape), (np.int32, ()), starts, starts), strict=True))
    optional, dtypes = optional or {}, {LOW_IDS: dtype, EMBEDDINGS: np.float32, LABELS: np.int64}
    kinds |= {array: (dtypes[array], shape) for array, shape in optional.items()}
    arrays = [_GrowingArray(folder / f"{name}.{array}.npy", *kind) for array, kind in kinds.items()]
    image_ids, text_ids, text_starts, caption_starts = arrays[:4]
    n_ids = n_captions = 0
    text_starts.append(np.zeros(1))
    caption_starts.append(np.zeros(1))
    for part in parts:
        image_ids.append(part.image_ids_NVHW)
        for array, more in zip(optional, arrays[4:], strict=True):
            more.append(getattr(part, _FIELDS[array]))
        text_ids.append(part.text_ids)
        text_starts.append(n_ids + np.cumsum(part.text_lengths))
        caption_starts.append(n_captions + np.cumsum(part.n_captions_N))
        n_ids, n_captions = n_ids + len(part.text_ids), n_captions + len(part.text_lengths)
    for array in arrays:
        array.close()


class _GrowingArray:
    """A `.npy` file written some rows at a time. Its header tells how many, so it is written again at the end.

    NumPy pads the header for just that: any number of rows leaves it as long as it was.
    """

    def __init__(self, path: Path, dtype: type[np.integer], row_shape: tuple[int, ...]) -> None:
        self._dtype, self._row_shape, self._n_rows = np.dtype(dtype), row_shape, 0
        self._file = open(path, "wb")
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        assert rows.shape[1:] == self._row_shape
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self._n_rows += len(rows)

    def close(self) -> None:
        end = self._file.tell()
        self._file.seek(0)
        self._write_header()
        assert end == self._file.tell() + self._n_rows * self._dtype.itemsize * int(np.prod(self._row_shape))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        shape = (self._n_rows, *self._row_shape)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
