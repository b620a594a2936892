"""Weights in TorchScript archives, which OpenAI's CLIPs are published as: tensors only, and no code is run.

`torch.jit.load` would compile and run the code in `code/`, and `torch.load(weights_only=True)` refuses such files. Here
only the pickle of attributes is read, by names that stand for tensors and containers; an object of a scripted class is
the dictionary of its attributes.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqt2i.errors import CheckpointError

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip: its mark, how long its name is and what follows that


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive that `torch.jit.save` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile:
        return False
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their names, memory-mapped.

    Raises:
        CheckpointError: a damaged archive, or one whose attributes are not only tensors, numbers and containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            reader = _Reader(archive, pickled.filename.removesuffix("data.pkl"), path)
            with archive.open(pickled) as file:
                root = reader.load(file)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the unpickler
        raise CheckpointError(f"{path}: damaged or not a TorchScript archive ({error}); copy it again") from None
    return dict(_tensors(root, ""))


class _Scripted(dict):
    """An object of a scripted class: its attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, folder: str, path: Path) -> None:
        self.archive, self.folder, self.path = archive, folder, path
        self._storages: dict[str, Tensor] = {}

    def load(self, file: Any) -> Any:
        unpickler = type("Unpickler", (pickle.Unpickler,), {
            "find_class": lambda _, module, name: self._named(module, name),
            "persistent_load": lambda _, key: self._storage(key),
        })  # fmt: skip
        return unpickler(file).load()

    def _named(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for; nothing else is ever called."""
        known: dict[tuple[str, str], Callable] = {
            ("torch._utils", "_rebuild_tensor_v2"): _view,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module.split(".")[0] == "__torch__":
            return _Scripted
        raise CheckpointError(f"{self.path}: not opened, for loading it would run {module}.{name}; expected the "
                              "parameters of a TorchScript module")  # fmt: skip

    def _storage(self, key: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        _, dtype, name, _, n_elements = key
        if name not in self._storages:
            info = self.archive.getinfo(f"{self.folder}data/{name}")
            with open(self.path, "rb") as file:
                file.seek(info.header_offset)
                mark, n_name, n_extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            n_bytes = n_elements * dtype.itemsize
            if mark != zipfile.stringFileHeader or info.compress_type != zipfile.ZIP_STORED or info.file_size < n_bytes:
                raise CheckpointError(f"{self.path}: damaged at {info.filename}; copy it again")
            start = info.header_offset + LOCAL_HEADER.size + n_name + n_extra
            content = np.memmap(self.path, np.uint8, "c", start, (n_bytes,)) if n_bytes else np.zeros(0, np.uint8)
            self._storages[name] = torch.from_numpy(content).view(dtype)
        return self._storages[name]


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _tensors(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, part in value.items() if isinstance(value, dict) else ():
        if isinstance(part, Tensor):
            yield f"{prefix}{name}", part
        else:
            yield from _tensors(part, f"{prefix}{name}.")
