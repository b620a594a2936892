"""Models in several parts, one of each device, as Megatron-LM divides them (Shoeybi et al. 2019, arXiv 1909.08053, §3):
made whole again tensor by tensor.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqt2i.errors import CheckpointError
from vqt2i.peers.reading import Checkpoint, read_checkpoint
from vqt2i.weights import LazyTensors

PART = re.compile(r"mp_rank_(\d+)_model_states\.pt")
TRACKER = "latest_checkpointed_iteration.txt"  # says which step's folder is the newest


class Split(NamedTuple):
    """Which axis of a tensor is divided. n_blocks: of as many blocks of that axis each part has a share."""

    axis: int
    n_blocks: int = 1


# of a tensor by its name; None is whole in every part
SplitOf = Callable[[str], Split | None]


class JoinedParts(LazyTensors):
    """The tensors of a model in parts, each joined when it is asked for.

    Raises:
        CheckpointError: the parts do not belong together.
    """

    def __init__(self, parts: Sequence[Checkpoint], split_of: SplitOf) -> None:
        self._parts, self._split_of = [part.tensors for part in parts], split_of
        first, path = self._parts[0], parts[0].path
        for other, tensors in zip(parts[1:], self._parts[1:], strict=True):
            if wrong := sorted(first.keys() ^ tensors.keys()):
                raise CheckpointError(f"{other.path}: {wrong[0]} is only in one of it and {path.name}; expected parts "
                                      "of one model")  # fmt: skip
            for name, tensor in first.items():
                same = tensor.shape == tensors[name].shape
                if not same or (split_of(name) is None and not torch.equal(tensor, tensors[name])):
                    raise CheckpointError(f"{other.path}: {name} is another than in {path.name}; expected parts of "
                                          "one model, of one step")  # fmt: skip

    def __getitem__(self, name: str) -> Tensor:
        split, parts = self._split_of(name), [tensors[name] for tensors in self._parts]
        if split is None:
            return parts[0]
        blocks = [part.chunk(split.n_blocks, split.axis) for part in parts]
        return torch.cat([shares[block] for block in range(split.n_blocks) for shares in blocks], split.axis)

    def __contains__(self, name: object) -> bool:  # a mapping's own makes the tensor to find out
        return name in self._parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])

    def like(self, name: str) -> Tensor:
        split, like = self._split_of(name), self._parts[0][name].to("meta")
        if split is None:
            return like
        shape = list(like.shape)
        shape[split.axis] *= len(self._parts)
        return like.new_empty(shape)


def read_parts(path: Path, split_of: SplitOf) -> Checkpoint:
    """The model in a folder of parts, or in the newest of several such folders by steps.

    Raises:
        CheckpointError: no parts, some are missing, or they do not belong together.
    """
    by_folder: dict[Path, dict[int, Path]] = {}
    for file in sorted(path.rglob("*.pt")):
        if found := PART.fullmatch(file.name):
            by_folder.setdefault(file.parent, {})[int(found[1])] = file
    if len(by_folder) > 1 and (path / TRACKER).is_file():
        newest = path / (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        by_folder = {folder: ranks for folder, ranks in by_folder.items() if folder == newest}
    if len(by_folder) != 1:
        raise CheckpointError(f"{path}: expected mp_rank_00_model_states.pt and perhaps more such parts in it, or in "
                              f"the folder of a step that {TRACKER} names; found {len(by_folder)} folders of parts"
                              )  # fmt: skip
    ((folder, ranks),) = by_folder.items()
    if missing := set(range(max(ranks) + 1)) - ranks.keys():
        raise CheckpointError(f"{folder}: lacks mp_rank_{min(missing):02d}_model_states.pt of {max(ranks) + 1} parts; "
                              "copy it again")  # fmt: skip
    parts = [read_checkpoint(ranks[rank]) for rank in sorted(ranks)]
    if len(parts) == 1:
        return parts[0]
    files = tuple(part.path for part in parts)
    return Checkpoint(parts[0].path, JoinedParts(parts, split_of), parts[0].rest, files)
