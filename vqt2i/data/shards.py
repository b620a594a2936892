"""The data set on disk: `data.json` beside uncompressed webdataset tars, written whole, read by random access.

    data.json            what is there: splits, shards with counts and hashes, languages, where it came from
    SPLIT-000000.tar     per sample: KEY.png or KEY.jpg, KEY.txt, KEY.LANG.txt, KEY.json, adjacent and in this order

`KEY.txt` holds the captions of the first language of `data.json`, one per line; other languages have their own file.
A sample without captions has no text file at all. In a data set of classes, whose names `data.json` lists, every
`KEY.json` says the sample's: {"label": "cat"}.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, PositiveInt

from vqt2i.config import Config, build_config
from vqt2i.data.pairs import Pair
from vqt2i.errors import ConfigError, DataError
from vqt2i.files import new_folder, sha256_of_file, sha256_of_parts, write_json

SPEC_NAME = "data.json"
MAX_KEY_CHARS = 80  # a ustar name holds 100 bytes, and ".LANG.txt" comes after the key
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
ImageFormat = Literal["png", "jpg"]

_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_CHARS}}}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8}){0,2}")
_BLOCK = 512  # the unit of a tar file, in bytes
_MEND = "copy the shard again or remake the data set"
_EXAMPLE = (
    '{"format_version": 1, "image_size_px": 64, "languages": ["en", "zh"], "source": {}, "splits": '
    '{"train": {"shards": [{"name": "train-000000.tar", "n_samples": 1000, "sha256": "..."}]}}}'
)


class ShardSpec(Config):
    """One tar file."""

    name: str
    n_samples: PositiveInt
    sha256: str


class SplitSpec(Config):
    """The shards of one split, in the order of its samples."""

    shards: tuple[ShardSpec, ...]

    @property
    def n_samples(self) -> int:
        return sum(shard.n_samples for shard in self.shards)


class DataSpec(Config):
    """What `data.json` says.

    image_size_px: every image is a square of this side; None where sizes differ.
    languages: language codes that occur; `KEY.txt` holds the first one. Empty for images without captions.
    labels: names of the classes, where every sample is of one; a model knows them by their places in this list.
    source: how the set was made, for people; it is no part of the fingerprint.
    """

    format_version: Literal[1] = 1
    image_size_px: PositiveInt | None
    languages: tuple[str, ...]
    labels: tuple[str, ...] = ()
    source: dict[str, Any] = Field(default_factory=dict)
    splits: dict[str, SplitSpec]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal content hash: equal for equal samples, wherever they came from."""
        # without classes as it was before there were any
        content = self.model_dump(mode="json", exclude={"source"} if self.labels else {"source", "labels"})
        return sha256_of_parts(json.dumps(content, sort_keys=True))


def is_key(text: str) -> bool:
    """Whether `text` can be a sample key: 1 to 80 ASCII letters, digits, '_' and '-'."""
    return _KEY.fullmatch(text) is not None


def is_language(text: str) -> bool:
    """Whether `text` looks like a language code: "en", "zh", "pt-BR", "zh-Hans-CN"."""
    return _LANGUAGE.fullmatch(text) is not None


# --- writing ---


class ShardWriter:
    """Writes samples into the shards of a folder, any order of splits, holding no more than one sample.

    Equal calls give equal bytes. Call `finish` at the end: it writes `data.json`.
    """

    def __init__(
        self, folder: Path, *, primary_language: str = "en", image_format: ImageFormat = "png", shard_size: int = 1000
    ) -> None:
        self.folder = folder
        self.primary_language = primary_language
        self.image_format = image_format
        self.shard_size = shard_size
        self._open: dict[str, tuple[tarfile.TarFile, int]] = {}  # split -> shard being written, samples in it
        self._shards: dict[str, list[ShardSpec]] = {}
        self._keys: set[str] = set()
        self._languages: set[str] = set()
        self._labels: set[str | None] = set()
        self._sizes: set[tuple[int, int]] = set()

    def add(self, split: str, pair: Pair) -> None:
        """Append one sample.

        Raises:
            ValueError: a key, language, caption, class or image that the format cannot hold.
        """
        self._check(pair)
        self._keys.add(pair.key)
        self._languages.update(pair.captions)
        self._labels.add(pair.label)
        self._sizes.add(pair.image_HW3.shape[:2])
        tar, count = self._open.get(split) or (self._start(split), 0)
        for suffix, content in self._files(pair):
            info = tarfile.TarInfo(f"{pair.key}.{suffix}")  # its defaults are fixed: mtime 0, uid 0, mode 644
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
        self._open[split] = (tar, count + 1)
        if count + 1 == self.shard_size:
            self._close(split)

    def finish(self, source: dict[str, Any]) -> DataSpec:
        """Close the shards, write `data.json` and return what it says."""
        for split in list(self._open):
            self._close(split)
        square = len(self._sizes) == 1 and len(set(next(iter(self._sizes)))) == 1
        others = sorted(self._languages - {self.primary_language})
        spec = DataSpec(
            image_size_px=next(iter(self._sizes))[0] if square else None,
            languages=(self.primary_language, *others) if self._languages else (),
            labels=tuple(sorted(label for label in self._labels if label is not None)),
            source=source,
            splits={split: SplitSpec(shards=tuple(shards)) for split, shards in self._shards.items()},
        )
        write_json(self.folder / SPEC_NAME, spec.model_dump(mode="json"))
        return spec

    def _check(self, pair: Pair) -> None:
        if not is_key(pair.key) or pair.key in self._keys:
            raise ValueError(f"key {pair.key!r}: expected a new one of up to {MAX_KEY_CHARS} characters A-Za-z0-9_-")
        shape, dtype = pair.image_HW3.shape, pair.image_HW3.dtype
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"{pair.key}: expected uint8 (H, W, 3), found {dtype} {shape}")
        for language, captions in pair.captions.items():
            if not is_language(language) or not captions:
                raise ValueError(f"{pair.key}: expected a language code with captions, found {language!r}: {captions}")
            if any(not caption.strip() or len(caption.splitlines()) != 1 for caption in captions):
                raise ValueError(f"{pair.key}: a caption is one line of text, found {captions}")

        if pair.label is not None and (not pair.label.strip() or len(pair.label.splitlines()) != 1):
            raise ValueError(f"{pair.key}: a class is one line of text, found {pair.label!r}")
        if self._labels and (pair.label is None) != (None in self._labels):
            raise ValueError(f"{pair.key}: class {pair.label!r}; either all samples have one or none has")

    def _files(self, pair: Pair) -> Iterator[tuple[str, bytes]]:
        yield self.image_format, encode_image(pair.image_HW3, self.image_format)
        for language, captions in pair.captions.items():
            suffix = "txt" if language == self.primary_language else f"{language}.txt"
            yield suffix, "\n".join(captions).encode()
        meta = pair.meta if pair.label is None else pair.meta | {"label": pair.label}
        if meta:
            yield "json", json.dumps(meta, ensure_ascii=False).encode()

    def _start(self, split: str) -> tarfile.TarFile:
        name = f"{split}-{len(self._shards.setdefault(split, [])):06d}.tar"
        return tarfile.open(self.folder / name, "w", format=tarfile.USTAR_FORMAT)

    def _close(self, split: str) -> None:
        tar, count = self._open.pop(split)
        tar.close()
        path = Path(tar.name)
        self._shards[split].append(ShardSpec(name=path.name, n_samples=count, sha256=sha256_of_file(path)))


def write_dataset(
    out: Path, splits: Mapping[str, Iterable[Pair]], *, source: dict[str, Any] | None = None, **options: Any
) -> "DataSet":
    """Write a whole data set: `out` appears complete, or not at all. `options` are those of `ShardWriter`.

    Raises:
        UserError: `out` exists and is not empty.
    """
    with new_folder(out) as folder:
        writer = ShardWriter(folder, **options)
        for split, pairs in splits.items():
            for pair in pairs:
                writer.add(split, pair)
        writer.finish(source or {})
    return DataSet.open(out)


def encode_image(image_HW3: np.ndarray, image_format: ImageFormat) -> bytes:
    """uint8 RGB to PNG (exact) or JPEG (quality 95, full chroma) bytes."""
    buffer = BytesIO()
    image = Image.fromarray(image_HW3)
    if image_format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


# --- reading ---


class DataSet:
    """A data set folder, opened. Cheap to pickle and safe to fork: it holds offsets and no open files."""

    def __init__(self, folder: Path, spec: DataSpec) -> None:
        self.folder = folder
        self.spec = spec
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "DataSet":
        """Read `data.json`; the shards of a split are indexed when it is first asked for.

        Raises:
            DataError: no folder, no `data.json`, one that does not fit, or a shard it names that is missing.
        """
        folder = Path(folder)
        path = folder / SPEC_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            what = f"no {SPEC_NAME} in it" if folder.is_dir() else "no such folder"
            raise DataError(
                f"{folder}: {what}; make a data set with `tools/make_dataset.py ... --out {folder}`. "
                f"Expected a {SPEC_NAME} like {_EXAMPLE}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        try:
            spec = build_config(DataSpec, json.loads(text), str(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: is not JSON ({error}). Expected a {SPEC_NAME} like {_EXAMPLE}") from None
        except ConfigError as error:
            raise DataError(f"{error}. Expected a {SPEC_NAME} like {_EXAMPLE}") from None
        for split in spec.splits.values():
            for shard in split.shards:
                if not (folder / shard.name).is_file():
                    raise DataError(f"{folder / shard.name}: missing, though {path} names it; {_MEND}")
        return cls(folder, spec)

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint

    @property
    def languages(self) -> tuple[str, ...]:
        return self.spec.languages

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; none where samples have none."""
        return self.spec.labels

    def split(self, name: str) -> "Split":
        """One split by name.

        Raises:
            DataError: no such split, or a shard that is short, damaged or holds another number of samples.
        """
        if name not in self.spec.splits:
            raise DataError(f"{self.folder}: no split '{name}'; it has {', '.join(self.spec.splits) or 'none'}")
        if name not in self._splits:
            self._splits[name] = Split(self.folder, self.spec.splits[name], self.languages, self.labels)
        return self._splits[name]


class Split(Sequence[Pair]):
    """The samples of one split in the order of writing: `split[i]` is a `Pair`, as a torch DataLoader wants it."""

    def __init__(self, folder: Path, spec: SplitSpec, languages: tuple[str, ...], labels: tuple[str, ...] = ()) -> None:
        self._paths = [folder / shard.name for shard in spec.shards]
        self._languages = languages
        self._labels = labels
        spans = [_index_shard(path, shard.n_samples) for path, shard in zip(self._paths, spec.shards, strict=True)]
        self._ends = np.cumsum([len(span) for span in spans])
        self._spans = np.concatenate([np.zeros((0, 2), np.int64), *spans])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Pair:
        """Sample `index` (negative counts from the end).

        Raises:
            IndexError: out of range.
            DataError: the sample's bytes are damaged; the message names the shard and the key.
        """
        path, key, files = self._sample(index)
        image_bytes = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image_bytes is None:
            raise DataError(f"{path}: sample '{key}' has no image, only {', '.join(files)}; {_MEND}")
        try:
            with Image.open(BytesIO(image_bytes)) as image:
                image_HW3 = np.array(image.convert("RGB"))
            meta = json.loads(files.get("json", b"{}"))
            label = meta.pop("label") if self._labels else None
            if self._labels and label not in self._labels:
                raise ValueError(f"label {label!r} is not one of those of {SPEC_NAME}")
            return Pair(key, image_HW3, self._captions(files), meta, label)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: sample '{key}' is damaged ({error}); {_MEND}") from None

    def captions(self, index: int) -> dict[str, tuple[str, ...]]:
        """The captions of sample `index` without decoding its image."""
        return self._captions(self._sample(index)[2])

    def _captions(self, files: dict[str, bytes]) -> dict[str, tuple[str, ...]]:
        names = {language: f"{language}.txt" if i else "txt" for i, language in enumerate(self._languages)}
        return {language: tuple(files[name].decode().splitlines()) for language, name in names.items() if name in files}

    def _sample(self, index: int) -> tuple[Path, str, dict[str, bytes]]:
        """The shard, the key, and the sample's files by suffix."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        path = self._paths[np.searchsorted(self._ends, index, side="right")]
        start, stop = self._spans[index].tolist()
        # Opened anew for each sample: about 10 us, against 100 and more to decode; nothing is shared between
        # processes and thousands of shards need no file handles.
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            content = file.read(stop - start)
        members = list(_members(content, path))
        return path, members[0].key, {m.suffix: content[m.start : m.start + m.size] for m in members}


class _Member(NamedTuple):
    """A file inside a tar: where its header and its content start, and how many bytes it holds."""

    key: str
    suffix: str
    header: int
    start: int
    size: int


def _members(content: bytes | memoryview, path: Path) -> Iterator[_Member]:
    """Walk the headers of a plain ustar file, or of a stretch of one, up to its end marker."""
    offset = 0
    while offset + _BLOCK <= len(content):
        header = bytes(content[offset : offset + _BLOCK])
        if not header[0]:
            return
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = int(header[124:136].rstrip(b"\0 "), 8)
        except ValueError:
            raise DataError(f"{path}: damaged at byte {offset}; {_MEND}") from None
        key, _, suffix = name.partition(".")
        if header[257:262] != b"ustar" or header[156:157] != b"0" or not is_key(key):
            raise DataError(
                f"{path}: '{name}' at byte {offset} was not written by make_dataset; "
                "import foreign tars with `tools/make_dataset.py webdataset`"
            )
        yield _Member(key, suffix, offset, offset + _BLOCK, size)
        offset += _BLOCK + -(-size // _BLOCK) * _BLOCK
    if offset != len(content):
        raise DataError(f"{path}: ends at byte {len(content)}, in the middle of a file; {_MEND}")


def _index_shard(path: Path, n_samples: int) -> np.ndarray:
    """The samples of a shard as int64 (n_samples, 2): first byte, and the byte after the last.

    Only headers are touched: the rest of the file is mapped, not read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        content = memoryview(np.memmap(path, np.uint8, "r")) if size else b""
    starts, stop, key = [], 0, None
    for member in _members(content, path):
        if member.key != key:
            starts.append(member.header)
            key = member.key
        stop = member.start + -(-member.size // _BLOCK) * _BLOCK
    if len(starts) != n_samples or stop + 2 * _BLOCK > size:  # a whole tar ends with two empty blocks
        raise DataError(f"{path}: holds {len(starts)} whole samples, {SPEC_NAME} says {n_samples}; {_MEND}")
    return np.stack([np.array(starts), np.array([*starts[1:], stop])], axis=1).astype(np.int64)
