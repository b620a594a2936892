"""A data set into a token store: every image through the image tokenizer once, every caption through the text one."""

import time
from pathlib import Path

import torch

from vqt2i.data.images import fit_square, to_tensor
from vqt2i.data.shards import DataSet
from vqt2i.data.store import SPEC_NAME, StoreSpec, TokenSplitWriter, TokenStore
from vqt2i.errors import DataError
from vqt2i.files import new_folder, write_json
from vqt2i.runtime import is_first_process, pick_device, progress
from vqt2i.text import TextTokenizer
from vqt2i.vq import ImageTokenizer


def store_spec(dataset: DataSet, vq: ImageTokenizer, tokenizer: TextTokenizer, splits: tuple[str, ...]) -> StoreSpec:
    """What the store of these three says."""
    grid = vq.config.grid_size
    return StoreSpec(
        dataset=dataset.fingerprint,
        image_tokenizer=vq.fingerprint,
        text_tokenizer=tokenizer.fingerprint,
        grid_height=grid,
        grid_width=grid,
        splits={name: len(dataset.split(name)) for name in splits},
    )


@torch.inference_mode()
def encode_dataset(
    dataset: DataSet,
    vq: ImageTokenizer,
    tokenizer: TextTokenizer,
    splits: tuple[str, ...],
    out: Path,
    batch_size: int = 64,
) -> TokenStore:
    """Write a token store; it appears whole or not at all. Images are fitted to the tokenizer's size.

    Raises:
        UserError: `out` is there already. DataError: a split that the data set does not have.
    """
    spec = store_spec(dataset, vq, tokenizer, splits)
    device, grid, size_px = pick_device(), (spec.grid_height, spec.grid_width), vq.config.image_size_px
    vq = vq.to(device)
    with new_folder(out) as folder:
        for name in splits:
            split = dataset.split(name)
            writer = TokenSplitWriter(folder, name, len(split), grid, vq.config.vocab_size)
            batches = [range(i, min(i + batch_size, len(split))) for i in range(0, len(split), batch_size)]
            for batch in progress(batches, f"encoding '{name}'", unit="batch"):
                pairs = [split[i] for i in batch]
                images = torch.stack([to_tensor(fit_square(pair.image_HW3, size_px)) for pair in pairs])
                texts = [[tokenizer.encode(t) for texts in pair.captions.values() for t in texts] for pair in pairs]
                writer.add(vq.encode(images.to(device)).cpu().numpy(), texts)
            writer.finish()
        write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
    return TokenStore.open(out)


def store_folder(dataset: DataSet, vq: ImageTokenizer, tokenizer: TextTokenizer) -> Path:
    """Where the store of these three is kept unless it is asked for elsewhere."""
    return dataset.folder / f"store-{vq.fingerprint[:8]}-{tokenizer.fingerprint[:8]}"


def ensure_store(dataset: DataSet, vq: ImageTokenizer, tokenizer: TextTokenizer, splits: tuple[str, ...]) -> TokenStore:
    """The store of these three beside the data set: opened if it is there, else made by the first process."""
    out = store_folder(dataset, vq, tokenizer)
    if not (out / SPEC_NAME).is_file():
        if is_first_process():
            return encode_dataset(dataset, vq, tokenizer, splits, out)
        while not (out / SPEC_NAME).is_file():
            time.sleep(0.5)
    store = TokenStore.open(out)
    expected = store_spec(dataset, vq, tokenizer, splits)
    held = {name: store.spec.splits.get(name) for name in expected.splits}
    if store.spec.model_copy(update={"splits": held}) != expected:
        raise DataError(f"{out}: encoded from another data set or other splits; remove it to encode again")
    return store
