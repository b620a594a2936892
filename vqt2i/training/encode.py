"""A data set into a token store: every image through the image tokenizer once, every caption through the text one.

For a GPT that reads embeddings of images, every image through the scorer that makes them too; for one that draws from
half the resolution, every image in twice the image tokenizer's size, and at half of that.

B batch, V variants, H W pixels
"""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vqt2i.clip import CLIP, embed_images
from vqt2i.data.images import Variants, fit_variant, halved, n_variants, require_side, to_tensor
from vqt2i.data.shards import DataSet
from vqt2i.data.store import (
    SPEC_NAME,
    StoreSpec,
    TokenPart,
    TokenStore,
    image_id_dtype,
    load_part,
    save_part,
    write_split,
)
from vqt2i.errors import DataError
from vqt2i.files import PARTIAL_PREFIX, new_folder, require_free, sha256_of_parts, write_json
from vqt2i.runtime import counter, is_first_process, pick_device, say
from vqt2i.text import TextTokenizer
from vqt2i.training.batches import BatchLoader
from vqt2i.vq import AnyImageTokenizer


def store_spec(
    dataset: DataSet, vq: AnyImageTokenizer, tokenizer: TextTokenizer, splits: tuple[str, ...], variants: Variants,
    scorer: CLIP | None = None, low_resolution: bool = False,
) -> StoreSpec:  # fmt: skip
    """What the store of these says.

    Raises:
        DataError: a split that the data set does not have.
    """
    for name in splits:
        if name not in dataset.spec.splits:
            raise DataError(f"{dataset.folder}: no split '{name}'; it has {', '.join(dataset.spec.splits) or 'none'}")
    return StoreSpec(
        image_tokenizer=vq.ids_fingerprint,
        text_tokenizer=tokenizer.fingerprint,
        scorer=scorer and scorer.fingerprint,
        embedding_width=scorer.config.embedding_width if scorer else 0,
        low_resolution=low_resolution,
        languages=dataset.languages,
        labels=dataset.labels,
        variants=variants,
        grid_height=vq.config.grid_height * (1 + low_resolution),
        grid_width=vq.config.grid_width * (1 + low_resolution),
        splits={name: dataset.spec.splits[name] for name in splits},
    )


def encode_dataset(
    dataset: DataSet,
    vq: AnyImageTokenizer,
    tokenizer: TextTokenizer,
    splits: tuple[str, ...],
    out: Path,
    *,
    scorer: CLIP | None = None,
    low_resolution: bool = False,
    variants: Variants = "centre",
    batch_size: int = 64,
    n_workers: int = 0,
) -> TokenStore:
    """Write a token store, or bring the one in `out` up to date; it appears whole or not at all.

    Images are fitted to the tokenizer's size, with `low_resolution` to twice that, and are encoded halved too.
    `n_workers` processes read and crop them (0: this one), this process encodes, `batch_size` images at a time; with a
    scorer, it embeds them too. A shard that the store in `out` holds already is copied (same SHA-256 in `data.json`,
    same tokenizers, scorer, variants and languages), so a grown data set costs what is new; splits of it that were not
    asked for stay. What is done is kept shard by shard beside `out`, and a call after a kill goes on there, to the same
    bytes.

    Raises:
        DataError: a split that the data set does not have; a store in `out` that shares no shard with the data set or
            was made with other tokenizers, variants or languages; with `low_resolution` a picture that is smaller than
            that. UserError: something else is in `out`.
    """
    held = TokenStore.open(out) if (out / SPEC_NAME).is_file() else None
    if held:
        splits = (*splits, *(name for name in held.spec.splits if name in dataset.spec.splits and name not in splits))
    spec = store_spec(dataset, vq, tokenizer, splits, variants, scorer, low_resolution)
    if held:
        if held.spec == spec:
            return held
        _require_alike(held, spec)
    else:
        require_free(out)
    work = out.with_name(f"{PARTIAL_PREFIX}{out.name}-{_short_name(spec)}")
    known = held.spec.shards if held else {}
    pending = {h: place for h, place in spec.shards.items() if h not in known and not _part_file(work, h).is_file()}
    if len(pending) < len(spec.shards):
        say(f"{out}: {len(spec.shards) - len(pending):,} of {len(spec.shards):,} shards are encoded already")
    _encode_shards(pending, work, dataset, vq, tokenizer, scorer, low_resolution, variants, batch_size, n_workers)
    held_splits = {name: held.split(name) for name in held.spec.splits} if held else {}

    def part_of(shard_hash: str) -> TokenPart:
        if shard_hash not in known:
            return load_part(_part_file(work, shard_hash))
        name, first, behind = known[shard_hash]
        return held_splits[name].part(first, behind)

    with new_folder(out, replace=held is not None) as folder:
        for name, split in spec.splits.items():
            parts = (part_of(shard.sha256) for shard in split.shards)
            dtype = image_id_dtype(vq.config.vocab_size)
            write_split(folder, name, parts, spec.image_shape, dtype, spec.optional_arrays)
        write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
    shutil.rmtree(work, ignore_errors=True)
    return TokenStore.open(out)


def _require_alike(held: TokenStore, spec: StoreSpec) -> None:
    """Check that a store is of the same data set, grown or changed in part, and of the same tokenizers."""
    for key in ("image_tokenizer", "text_tokenizer", "scorer", "low_resolution", "languages", "labels", "variants"):
        found, expected = getattr(held.spec, key), getattr(spec, key)
        if found != expected:
            raise DataError(f"{held.folder}: encoded with {key} {found}, expected {expected}; "
                            "choose another folder, or remove it to encode again")  # fmt: skip
    if not held.spec.shards.keys() & spec.shards.keys():
        raise DataError(f"{held.folder}: encoded from another data set: none of its shards is in this one; "
                        "choose another folder, or remove it to encode again")  # fmt: skip


def _short_name(spec: StoreSpec) -> str:
    """Of everything but the shards that decides what a sample's ids are."""
    tokenizers = (spec.image_tokenizer, spec.text_tokenizer, *([spec.scorer] if spec.scorer else []))
    low = ["low_resolution"] if spec.low_resolution else []
    return sha256_of_parts(*tokenizers, *low, spec.variants, *spec.languages, *spec.labels)[:16]


def _part_file(work: Path, shard_hash: str) -> Path:
    return work / f"{shard_hash}.npz"


class _Pictures(NamedTuple):
    """A batch as the workers make it: uint8 pixels, the ids of all captions, the numbers of the classes if any."""

    images_BVHW3: torch.Tensor
    text_ids: np.ndarray
    text_lengths: np.ndarray
    n_captions_B: np.ndarray
    labels_B: np.ndarray


class _Reading:
    """Samples of a split, by (split, indices). A class and no closure: data loader workers may pickle it."""

    def __init__(
        self, dataset: DataSet, tokenizer: TextTokenizer, size_px: int, variants: Variants, least_px: int
    ) -> None:
        self.dataset, self.tokenizer, self.size_px, self.variants = dataset, tokenizer, size_px, variants
        self.numbers = {label: number for number, label in enumerate(dataset.labels)}
        self.least_px = least_px

    def __call__(self, key: tuple[str, range]) -> _Pictures:
        split = self.dataset.split(key[0])
        pairs = [split[index] for index in key[1]]
        for pair in pairs:
            require_side(pair.image_HW3, self.least_px, f"{self.dataset.folder}: {pair.key}")
        images = [
            np.stack([fit_variant(pair.image_HW3, self.size_px, self.variants, v) for v in self._variants()])
            for pair in pairs
        ]
        texts = [self.tokenizer.encode(t) for pair in pairs for texts in pair.captions.values() for t in texts]
        return _Pictures(
            torch.from_numpy(np.stack(images)),
            np.array([i for ids in texts for i in ids], np.int32),
            np.array([len(ids) for ids in texts], np.int64),
            np.array([sum(map(len, pair.captions.values())) for pair in pairs], np.int64),
            np.array([self.numbers[pair.label] for pair in pairs if self.numbers], np.int64),
        )

    def _variants(self) -> range:
        return range(n_variants(self.variants))


@torch.inference_mode()
def _encode_shards(
    shards: dict[str, tuple[str, int, int]], work: Path, dataset: DataSet, vq: AnyImageTokenizer,
    tokenizer: TextTokenizer, scorer: CLIP | None, low_resolution: bool, variants: Variants, batch_size: int,
    n_workers: int,
) -> None:  # fmt: skip
    """Write the part of each shard. No batch reaches into the next shard, so that a part is always the same."""
    if not shards:
        return
    device, step = pick_device(), max(batch_size // n_variants(variants), 1)
    vq, scorer = vq.to(device), scorer and scorer.to(device)
    batches = {
        shard_hash: [(name, range(i, min(i + step, behind))) for i in range(first, behind, step)]
        for shard_hash, (name, first, behind) in shards.items()
    }
    for name, _, _ in shards.values():
        dataset.split(name)  # indexed once here and not by every worker
    size_px = vq.config.image_size_px * (1 + low_resolution)
    reading = _Reading(dataset, tokenizer, size_px, variants, least_px=size_px if low_resolution else 1)
    pictures = iter(BatchLoader(reading, [key for keys in batches.values() for key in keys], n_workers))
    total = n_variants(variants) * sum(behind - first for _, first, behind in shards.values())
    with counter("encoding", total, unit="images") as advance:
        for shard_hash, keys in batches.items():
            parts = []
            for _ in keys:
                batch = next(pictures)
                images = batch.images_BVHW3.flatten(0, 1).to(device, non_blocking=True)  # a quarter of the floats
                pixels, shape = to_tensor(images), batch.images_BVHW3.shape[:2]
                ids = _codes(vq, pixels, shape)
                part = TokenPart(ids, batch.text_ids, batch.text_lengths, batch.n_captions_B, labels_N=batch.labels_B)
                if low_resolution:
                    part = part._replace(low_ids_NVHW=_codes(vq, halved(pixels), shape))
                if scorer:
                    embeddings = embed_images(scorer, pixels).unflatten(0, shape).cpu().numpy()
                    part = part._replace(embeddings_NVE=embeddings)
                parts.append(part)
                advance(len(images))
            part = TokenPart(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            save_part(_part_file(work, shard_hash), part)


def _codes(vq: AnyImageTokenizer, pixels: torch.Tensor, shape: torch.Size) -> np.ndarray:
    """The ids of pictures in a row, as (samples, variants, grid height, grid width) of a store."""
    return vq.encode(pixels).unflatten(0, shape).cpu().numpy().astype(image_id_dtype(vq.config.vocab_size))


def store_folder(
    dataset: DataSet, vq: AnyImageTokenizer, tokenizer: TextTokenizer, variants: Variants = "centre",
    scorer: CLIP | None = None, low_resolution: bool = False,
) -> Path:  # fmt: skip
    """Where the store of these is kept unless it is asked for elsewhere."""
    ending = f"-{scorer.fingerprint[:8]}" if scorer else ""
    ending += "-low-resolution" if low_resolution else ""
    ending += "" if variants == "centre" else f"-{variants}"
    return dataset.folder / f"store-{vq.ids_fingerprint[:8]}-{tokenizer.fingerprint[:8]}{ending}"


def ensure_store(
    dataset: DataSet, vq: AnyImageTokenizer, tokenizer: TextTokenizer, splits: tuple[str, ...], *,
    scorer: CLIP | None = None, low_resolution: bool = False, variants: Variants = "centre", n_workers: int = 0,
) -> TokenStore:  # fmt: skip
    """The store of these beside the data set, up to date: what it lacks is encoded by the first process.

    Raises:
        DataError: as `encode_dataset`.
    """
    out = store_folder(dataset, vq, tokenizer, variants, scorer, low_resolution)
    if is_first_process():
        return encode_dataset(
            dataset, vq, tokenizer, splits, out, scorer=scorer, low_resolution=low_resolution, variants=variants,
            n_workers=n_workers,
        )  # fmt: skip
    expected = store_spec(dataset, vq, tokenizer, splits, variants, scorer, low_resolution)
    while True:
        if (out / SPEC_NAME).is_file():
            store = TokenStore.open(out)
            held = {name: store.spec.splits.get(name) for name in splits}
            if store.spec.model_copy(update={"splits": held}) == expected:
                return store
        time.sleep(0.5)
