import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from vqt2i.errors import CheckpointError
from vqt2i.weights import INDEX, WEIGHTS, Later, Weights, weight_files, write_weights

TENSORS = {
    "b": torch.randn(3, 2).bfloat16(), "a.weight": torch.randn(2, 2), "n": torch.tensor(3), "é": torch.randn(1, 0),
    "seen": torch.tensor([True, False]), "half": torch.randn(5).half(), "d": torch.randn(4, 1, 2),
}  # fmt: skip


def later(tensors: dict[str, Tensor]) -> dict[str, Later]:
    return {name: Later(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def test_one_file_is_byte_by_byte_what_the_library_writes(tmp_path: Path) -> None:
    sizes: list[int] = []
    assert write_weights(tmp_path, later(TENSORS), on_bytes=sizes.append) == [tmp_path / WEIGHTS]
    plain = {name: tensor for name, tensor in TENSORS.items() if name != "half"}
    assert sum(sizes) == sum(t.numel() * t.element_size() for t in TENSORS.values())
    write_weights(tmp_path, later(plain))
    assert (tmp_path / WEIGHTS).read_bytes() == save(plain)


def test_shards_hold_what_one_file_does_and_none_is_larger_than_asked(tmp_path: Path) -> None:
    files = write_weights(tmp_path, later(TENSORS), shard_bytes=30)
    assert len(files) > 2 and weight_files(tmp_path) == files
    found = Weights(files)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    for file in files:
        own = [name for name, at in index["weight_map"].items() if at == file.name]
        size = sum(TENSORS[name].numel() * TENSORS[name].element_size() for name in own)
        assert size <= 30 or len(own) == 1


def test_a_tensor_is_made_when_its_turn_comes(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str, tensor: Tensor) -> Tensor:
        assert len(made) == sum(size > 0 for size in sizes)
        made.append(name)
        return tensor

    sizes: list[int] = []
    tensors = {
        name: Later(tuple(t.shape), t.dtype, lambda name=name, t=t: make(name, t))
        for name, t in TENSORS.items() if t.numel()
    }  # fmt: skip
    write_weights(tmp_path, tensors, on_bytes=sizes.append)
    assert sorted(made) == sorted(tensors)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=f"{INDEX}: not an index"):
        weight_files(tmp_path)
