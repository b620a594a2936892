import argparse
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqt2i.errors import CheckpointError
from vqt2i.peers.reading import read_checkpoint

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.half)}


class Hook:
    """Stands for an object of a trainer's class."""

    def __init__(self) -> None:
        self.best = {"path": "last.ckpt"}


class Runs:
    """Asks whoever loads it to run a command."""

    def __init__(self, function, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(path).tensors)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": OrderedDict(s), "epoch": 3},
                                  lambda s: {"model": s, "args": argparse.Namespace(image_size=256)},
                                  lambda s: {"module": s, "optimizer": {"state": {}}}])  # fmt: skip
def test_weights_are_found_where_trainers_put_them(tmp_path: Path, wrap) -> None:
    torch.save(wrap(STATE), tmp_path / "m.pt")
    found = tensors_of(tmp_path / "m.pt")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in STATE.items())


def test_what_else_is_there_is_told(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(image_size=256), "steps": 7}, tmp_path / "m.pt")
    rest = read_checkpoint(tmp_path / "m.pt").rest
    assert rest["steps"] == 7 and rest["args"].image_size == 256


def test_safetensors_and_files_from_before_pytorch_1_6_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.safetensors")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "old.pt"):
        assert torch.equal(tensors_of(tmp_path / name)["a.weight"], STATE["a.weight"])


def test_objects_of_trainers_classes_are_replaced_by_inert_ones(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Hook, "__module__", "pytorch_lightning.callbacks")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", argparse)
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", argparse)
    monkeypatch.setattr(argparse, "Hook", Hook, raising=False)
    torch.save({"state_dict": STATE, "callbacks": {Hook: {"best": 1}}, "hook": Hook()}, tmp_path / "m.ckpt")
    monkeypatch.undo()
    checkpoint = read_checkpoint(tmp_path / "m.ckpt")
    assert checkpoint.tensors.keys() == STATE.keys() and checkpoint.rest["hook"] == {}


@pytest.mark.parametrize(("function", "arguments"), [
    (os.system, "touch {}"), (eval, "open('{}', 'w')"), (os.mkdir, "{}"), (pickle.loads, "{}"),
])  # fmt: skip
@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_file_is_not_run_and_the_file_refused(tmp_path: Path, function, arguments: str, as_zip: bool) -> None:
    trap = tmp_path / "trap"
    content = {"state_dict": STATE, "callbacks": Runs(function, arguments.format(trap))}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(CheckpointError, match=r"m\.ckpt: not opened, for loading it would run"):
        read_checkpoint(tmp_path / "m.ckpt")
    assert not trap.exists()


def test_a_placeholder_called_with_a_command_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    body = f"cpytorch_lightning.utilities\nsystem\n(Vtouch {trap}\ntR.".encode()
    torch.save({"state_dict": STATE, "x": 1}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as source, zipfile.ZipFile(tmp_path / "n.ckpt", "w") as target:
        for name in source.namelist():
            target.writestr(name, body if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "n.ckpt")
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    for name, as_zip in (("m.pt", True), ("old.pt", False)):
        torch.save({"model": STATE}, tmp_path / name, _use_new_zipfile_serialization=as_zip)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(CheckpointError, match=rf"{name}: damaged or not a checkpoint"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(("content", "told"), [
    ([1, 2], "holds a list"), ({}, "no weights in it, found nothing"), ({"epoch": 3}, "no weights in it, found epoch"),
])  # fmt: skip
def test_a_file_without_weights_is_refused(tmp_path: Path, content: object, told: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=told):
        read_checkpoint(tmp_path / "m.pt")


def test_no_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for path, told in ((tmp_path / "none.pt", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(CheckpointError, match=told):
            read_checkpoint(path)
