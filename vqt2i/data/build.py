"""From a source to a data set on disk: decode, filter, find duplicates, deal into splits, write, report."""

import re
import time
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from vqt2i.config import Config
from vqt2i.data import shapes
from vqt2i.data.decode import DEFAULT_MAX_PIXELS, MOST_PIXELS, RefusedError, clean_captions, decode_image
from vqt2i.data.duplicates import Duplicates, Signature, signature
from vqt2i.data.images import fit_square
from vqt2i.data.pairs import Pair
from vqt2i.data.report import Report, TokenCount
from vqt2i.data.shards import MAX_KEY_CHARS, SPEC_NAME, DataSet, ImageFormat, ShardWriter, is_language
from vqt2i.data.sources import Entries, Item, Rejection
from vqt2i.errors import DataError
from vqt2i.files import new_folder
from vqt2i.runtime import is_first_process, progress, say


class BuildConfig(Config):
    """What to keep and how to store it.

    size_px: centre-crop and resize to this square; None keeps every picture as it is.
    min_side_px, max_aspect: of the picture in the source; longer over shorter side.
    min_caption_chars, max_caption_chars: a caption outside is left out; a sample without any left is rejected.
    caption_pattern: a regular expression; captions in which it is found nowhere are left out as well.
    captions_required: reject samples that have no caption.
    labelled: keep the class of each sample, and reject those that have none.
    drop_duplicates: which kinds of repeated pictures to reject; near includes exact.
    val_share: of the pictures whose source names no split, so many go to val, chosen by a hash of their pixels, and at
        least one if it is above 0.
    """

    size_px: PositiveInt | None = None
    min_side_px: PositiveInt = 1
    max_aspect: float | None = Field(default=None, ge=1)
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1, le=MOST_PIXELS)
    min_caption_chars: PositiveInt = 1
    max_caption_chars: PositiveInt | None = None
    caption_pattern: str | None = None
    captions_required: bool = True
    labelled: bool = False
    drop_duplicates: Literal["exact", "near", "none"] = "exact"
    val_share: float = Field(default=0.02, ge=0, lt=1)
    primary_language: str = "en"
    image_format: ImageFormat = "png"
    shard_size: PositiveInt = 1000

    @field_validator("primary_language")
    @classmethod
    def _check_language(cls, language: str) -> str:
        if not is_language(language):
            raise ValueError("expected a language code such as en, zh or pt-BR")
        return language

    @field_validator("caption_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"expected a regular expression: {error}") from None
        return pattern


class _Sample(NamedTuple):
    """A sample that can be used."""

    item: Item
    image_HW3: np.ndarray
    captions: dict[str, tuple[str, ...]]
    label: str | None
    size_px: tuple[int, int]  # (width, height) in the source
    notes: list[str]
    signature: Signature


def build_dataset(
    out: Path,
    entries: Iterable[Item | Rejection],
    config: BuildConfig,
    *,
    source: dict[str, Any],
    token_count: TokenCount | None = None,
    total: int | None = None,
) -> DataSet:
    """Make a data set of what a source yields. `out` appears whole, with its report, or not at all.

    source: says in `data.json` where it came from. total: how many entries to expect, for the progress bar.

    Raises:
        DataError: nothing could be used for training; the message counts the reasons.
        UserError: `out` exists and is not empty.
    """
    with new_folder(out) as folder:
        writer = ShardWriter(
            folder,
            primary_language=config.primary_language,
            image_format=config.image_format,
            shard_size=config.shard_size,
        )
        with Report(folder, token_count) as report:
            watched = progress(entries, "reading", total=total, unit="samples")
            samples = _distinct(_usable(watched, config, report), config, report)
            names = _Names()
            for split, sample in _dealt(samples, config.val_share):
                pair = Pair(names.key(sample.item), sample.image_HW3, sample.captions, sample.item.meta, sample.label)
                writer.add(split, pair)
                report.add(split, pair, sample.size_px)
            spec = writer.finish(source)
            if "train" not in spec.splits:
                raise DataError(_nothing_usable(report, "train" if spec.splits else ""))
            report.write(str(out), spec)
    counts = ", ".join(f"{name} {split.n_samples:,}" for name, split in spec.splits.items())
    say(f"{out}: {counts} samples, {report.rejections.total():,} rejected; see {out / 'report.html'}")
    return DataSet.open(out)


def _usable(entries: Iterable[Item | Rejection], config: BuildConfig, report: Report) -> Iterator[_Sample]:
    """Decode and filter; what does not pass goes to the report."""
    for entry in entries:
        if isinstance(entry, Rejection):
            report.reject(entry)
            continue
        try:
            yield _check(entry, config)
        except RefusedError as refused:
            report.reject(Rejection(entry.name, refused.reason, refused.detail, plain_key(entry.key)))


def _check(item: Item, config: BuildConfig) -> _Sample:
    if isinstance(item.image, bytes):
        image_HW3, notes = decode_image(item.image, config.max_pixels)
    else:
        image_HW3, notes = item.image, []
    height, width = image_HW3.shape[:2]
    if min(height, width) < config.min_side_px:
        raise RefusedError("side too short", f"{width} x {height} pixels, expected {config.min_side_px} or more")
    if config.max_aspect and max(height, width) > config.max_aspect * min(height, width):
        raise RefusedError("too elongated", f"{width} x {height} pixels, expected at most {config.max_aspect:g} to 1")
    captions, caption_notes = _check_captions(item, config)
    label = _check_label(item) if config.labelled else None
    stored_HW3 = fit_square(image_HW3, config.size_px) if config.size_px else image_HW3
    notes = [*item.notes, *notes, *caption_notes]
    return _Sample(item, stored_HW3, captions, label, (width, height), notes, signature(stored_HW3))


def _check_captions(item: Item, config: BuildConfig) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    captions, notes, n_found = {}, [], 0
    for language, texts in item.captions.items():
        kept = []
        for text in texts:
            found, text_notes = clean_captions(text)
            notes += text_notes
            n_found += len(found)
            for caption in found:
                if len(caption) < config.min_caption_chars:
                    notes.append("caption left out: too short")
                elif config.max_caption_chars and len(caption) > config.max_caption_chars:
                    notes.append("caption left out: too long")
                elif config.caption_pattern and not re.search(config.caption_pattern, caption):
                    notes.append("caption left out: without the pattern")
                else:
                    kept.append(caption)
        if kept:
            captions[language] = tuple(kept)
    if config.captions_required and not captions:
        if n_found:
            wanted = f"{config.min_caption_chars} to {config.max_caption_chars or 'any number of'} characters"
            wanted += f" with the pattern {config.caption_pattern!r}" if config.caption_pattern else ""
            raise RefusedError("no caption as wanted", f"{n_found} found, none of {wanted}")
        raise RefusedError("empty caption" if any(item.captions.values()) else "missing caption")
    return captions, notes


def _check_label(item: Item) -> str:
    """The name of the class, cleaned as a caption is, in one line."""
    try:
        lines = clean_captions(item.label or "").captions
    except RefusedError as refused:
        raise RefusedError(refused.reason.replace("caption", "class"), refused.detail) from None
    if not lines:
        raise RefusedError("missing class")
    return " ".join(lines)


def _distinct(samples: Iterator[_Sample], config: BuildConfig, report: Report) -> Iterator[_Sample]:
    """Count duplicates and drop those asked for, and any picture that another split holds already."""
    seen = Duplicates()
    dropped = {"none": (), "exact": ("exact",), "near": ("exact", "near")}[config.drop_duplicates]
    for sample in samples:
        item = sample.item
        twin = seen.twin(sample.signature)
        if twin:
            report.duplicates[twin.kind] += 1
            leak = twin.kind == "exact" and twin.split != item.split
            if leak or twin.kind in dropped:
                reason = "in another split" if leak else f"{twin.kind} duplicate"
                report.reject(Rejection(item.name, reason, f"of {twin.name}", plain_key(item.key)))
                continue
        seen.add(sample.signature, item.name, item.split)
        report.notes.update(sample.notes)
        yield sample


def _dealt(samples: Iterator[_Sample], val_share: float) -> Iterator[tuple[str, _Sample]]:
    """(split, sample): the one the source names, else by the hash of the pixels, so that equal pictures stay together.

    The picture of the smallest hash, with its copies, waits until the end and then goes to val, whatever the share: so
    a small set has a val split too. (In a large one its hash is below the share anyway.)
    """
    waiting: list[_Sample] = []
    any_train = False
    for sample in samples:
        ready = [sample]
        if sample.item.split is None and val_share > 0:
            lowest = waiting[0].signature.share if waiting else 1.0
            if sample.signature.share < lowest:
                ready, waiting = waiting, ready
            elif sample.signature.share == lowest:
                waiting.append(sample)
                continue
        for one in ready:
            split = one.item.split or ("val" if one.signature.share < val_share else "train")
            any_train |= split == "train"
            yield split, one
    for one in waiting:
        yield ("val" if any_train else "train"), one


class _Names:
    """Gives every sample a key of its own: same-named files of different folders, say."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def key(self, item: Item) -> str:
        key, attempt = plain_key(item.key), 0
        while key in self._taken:
            mark = blake2b(repr((item.name, attempt)).encode(), digest_size=4).hexdigest()
            key = f"{plain_key(item.key)[: MAX_KEY_CHARS - 9]}-{mark}"
            attempt += 1
        self._taken.add(key)
        return key


def plain_key(text: str) -> str:
    """`text` with what a key cannot hold replaced: folders are joined by "__", the rest by "-"."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", text.replace("/", "__")).strip("-")
    return key[-MAX_KEY_CHARS:] or "sample"


def _nothing_usable(report: Report, missing_split: str) -> str:
    what = f"nothing usable for {missing_split}" if missing_split else "nothing usable"
    if not report.first_rejection:
        return f"{what}: the source is empty"
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in report.rejections.most_common(5))
    first = report.first_rejection
    detail = f": {first.detail}" if first.detail else ""
    return f"{what}; rejected: {reasons}. The first: {first.name}: {first.reason}{detail}"


# --- the embedded default ---

DEFAULT_COUNTS = {"train": 30_000, "val": 1_000, "unseen": 1_000}
STYLE_COUNTS = {"train": 20, "val": 20, "unseen": 20}
# There are few enough simple scenes that some come twice, under other captions: no fault in this set.
SHAPES_CONFIG = BuildConfig(size_px=32, drop_duplicates="none")


Style = Literal["plain", "beach"]


def shapes_items(
    counts: dict[str, int], seed: int, size_px: int, style: Style = "plain", labels: shapes.LabelName | None = None
) -> Entries:
    """The embedded set: `counts` scenes of each split; with `labels`, of one object each, whose class that is."""
    pairs = {"plain": shapes.pairs, "beach": shapes.beach_pairs}[style]
    if labels:
        pairs = partial(shapes.labelled_pairs, labels)
    for split, n in counts.items():
        for pair in pairs(split, n, seed, size_px):
            captions = {language: list(texts) for language, texts in pair.captions.items()}
            yield Item(pair.key, pair.key, pair.image_HW3, captions, pair.meta, split, label=pair.label)


def build_shapes(
    out: Path,
    *,
    config: BuildConfig = SHAPES_CONFIG,
    counts: dict[str, int] = DEFAULT_COUNTS,
    seed: int = 0,
    style: Style = "plain",
    labels: shapes.LabelName | None = None,
    token_count: TokenCount | None = None,
) -> DataSet:
    """Draw the embedded data set, reproducible from `seed`, at `config.size_px`; see `shapes_items`.

    Raises:
        DataError: labels of another style than plain.
    """
    if labels and style != "plain":
        raise DataError(f"classes by {labels} are of the plain style, found {style}; leave out one of them")
    source = {"kind": "shapes", "size_px": config.size_px, "counts": counts, "seed": seed}
    return build_dataset(
        out,
        shapes_items(counts, seed, config.size_px, style, labels),
        config.model_copy(update={"labelled": labels is not None}),
        source=source | ({} if style == "plain" else {"style": style}) | ({"labels": labels} if labels else {}),
        token_count=token_count,
        total=sum(counts.values()),
    )


def ensure_default_dataset(folder: Path) -> DataSet:
    """The embedded data set at `folder`, drawn first if it is not there yet.

    Of several processes the first one draws and the others wait for it.
    """
    if not (folder / SPEC_NAME).exists():
        if is_first_process():
            say(f"{folder}: no data set there yet; drawing the embedded one ({SHAPES_CONFIG.size_px} px shapes), once")
            return build_shapes(folder)
        while not (folder / SPEC_NAME).exists():
            time.sleep(0.5)
    return DataSet.open(folder)
