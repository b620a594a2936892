"""Weights on disk: safetensors that are written and read tensor by tensor, in several files where they are many bytes.

One file is `weights.safetensors`, byte by byte what the `safetensors` library writes, which wants all tensors at once.
Several are `weights-00001-of-00003.safetensors` and so on, beside an index as that of `transformers`:
`weights.safetensors.index.json`, in whose `weight_map` each name has its file.
"""

import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqt2i.errors import CheckpointError
from vqt2i.files import write_json

WEIGHTS, INDEX = "weights.safetensors", "weights.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a file at most, but for a single tensor that is larger
NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written: its shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    folder: Path,
    tensors: Mapping[str, Later],
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write tensors into a folder, one after another, and return the files in their order.

    Args:
        on_bytes: called after each tensor with its size.
    """
    # as the library orders them: what wants more alignment first, then by name
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shards: list[list[str]] = [[]]
    for name in names:
        if shards[-1] and sum(tensors[n].n_bytes for n in shards[-1]) + tensors[name].n_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    stem, ending = WEIGHTS.split(".")
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.{ending}" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [WEIGHTS]
    for file, shard in zip(files, shards, strict=True):
        _write(folder / file, {name: tensors[name] for name in shard}, on_bytes)
    if len(shards) > 1:
        size = sum(tensor.n_bytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    return [folder / file for file in files]


def _write(path: Path, tensors: Mapping[str, Later], on_bytes: Callable[[int], None] | None) -> None:
    header, start = {}, 0
    for name, tensor in tensors.items():
        end = start + tensor.n_bytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            made = tensor.make()
            assert (tuple(made.shape), made.dtype) == (tensor.shape, tensor.dtype), name
            file.write(made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            if on_bytes:
                on_bytes(tensor.n_bytes)
        file.flush()
        os.fsync(file.fileno())


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder, in the order in which they were written.

    Raises:
        CheckpointError: an index that is none.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / WEIGHTS]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weights ({error}); copy it again") from None


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by their names, each read or made when it is asked for."""

    @abstractmethod
    def like(self, name: str) -> Tensor:
        """One of that shape and dtype on the meta device; nothing is read."""


class Weights(LazyTensors):
    """The tensors in some safetensors files, each read when it is asked for.

    Raises:
        CheckpointError: a file is damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except SafetensorError as error:
                raise CheckpointError(f"{file}: damaged or not safetensors ({error}); copy it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:  # a mapping's own makes the tensor to find out
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def like(self, name: str) -> Tensor:
        dtype = DTYPES[self._files[name].get_slice(name).get_dtype()]
        return torch.empty(self.shape(name), dtype=dtype, device="meta")
