"""Trainings on streams, and on two data sets."""

from pathlib import Path

import pytest
import torch
from lightning import LightningModule

from vqt2i.checkpoint import read_card
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import ConfigError, DataError
from vqt2i.training.clip import CLIPModule
from vqt2i.training.gpt import GPTModule
from vqt2i.training.vqgan import VQGANModule


@pytest.fixture
def stream(tiny_dataset: DataSet, tmp_path: Path) -> str:
    """The setting of a stream of six shards."""
    folder = write_dataset(tmp_path / "shards", {"train": tiny_dataset.split("train")}, shard_size=4).folder
    urls = f"'{folder}/train-{{000000..000005}}.tar'"
    return f"data.stream={{urls: {urls}, samples_per_shard: 4, shuffled_shards: 2}}"


class StopError(Exception):
    pass


@pytest.mark.parametrize(("stage", "module", "n_workers"),
                         [("vqgan", VQGANModule, 2), ("gpt", GPTModule, 0), ("clip", CLIPModule, 1)])  # fmt: skip
def test_a_streamed_run_that_was_interrupted_and_resumed_ends_with_the_same_weights(
    stage: str, module: type[LightningModule], n_workers: int, stream: str, train, weights, monkeypatch, tmp_path: Path
) -> None:
    def stop(self, outputs, batch, batch_index) -> None:
        if self.global_step == 7:
            raise StopError

    more = [stream, f"trainer.n_workers={n_workers}", *(["source=images"] if stage == "gpt" else [])]
    whole = weights(train(stage, *more, runs=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(module, "on_train_batch_end", stop)
        train(stage, *more)
    resumed = weights(train(stage, *more, resume="auto"))
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []


def test_a_shard_that_is_missing_mid_run_is_told(stream: str, train, tmp_path: Path) -> None:
    (tmp_path / "shards" / "train-000003.tar").unlink()
    with pytest.raises(DataError, match=r"train-000003\.tar: shard cannot be opened .*unreadable=skip"):
        train("clip", stream)
    train("clip", stream, "data.stream.unreadable=skip")


def test_a_stream_needs_images_and_a_data_set_to_validate_on(stream: str, train) -> None:
    with pytest.raises(ConfigError, match="set source=images"):
        train("gpt", stream)
    with pytest.raises(ConfigError, match="set path to a data set"):
        train("clip", stream, "data.path=data/shapes")


def test_a_stream_goes_on_with_as_many_workers_only(stream: str, train, monkeypatch) -> None:
    def stop(self, outputs, batch, batch_index) -> None:
        if self.global_step == 7:
            raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(CLIPModule, "on_train_batch_end", stop)
        train("clip", stream)
    with pytest.raises(ConfigError, match=r"trainer\.n_workers: 0 before, 2 now; data\.stream needs as many"):
        train("clip", stream, "trainer.n_workers=2", resume="auto")
    train("clip", stream, "trainer.n_workers=1", resume="auto")  # reads what no worker reads


@pytest.fixture
def others(tiny_dataset: DataSet, tmp_path: Path) -> Path:
    """A second data set, of other pictures."""
    return write_dataset(tmp_path / "others", {"train": tiny_dataset.split("val")}).folder


@pytest.mark.parametrize(("stage", "module", "more"),
                         [("vqgan", VQGANModule, []), ("gpt", GPTModule, ["training.null_share=0.3"]),
                          ("gpt", GPTModule, ["source=images"]), ("clip", CLIPModule, [])])  # fmt: skip
def test_a_run_on_two_data_sets_that_was_interrupted_and_resumed_ends_with_the_same_weights(
    stage: str, module: type[LightningModule], more: list[str], others: Path, train, weights, monkeypatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    def stop(self, outputs, batch, batch_index) -> None:
        if self.global_step == 7:
            raise StopError

    alone = weights(train(stage, *more, runs=tmp_path / "alone"))
    more = [*more, f"data.also={{path: '{others}', share: 0.25}}"]
    whole = weights(train(stage, *more, runs=tmp_path / "whole"))
    assert not all(torch.equal(alone[name], whole[name]) for name in whole)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(module, "on_train_batch_end", stop)
        train(stage, *more)
    resumed = weights(train(stage, *more, resume="auto"))
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []


@pytest.mark.parametrize("stage", ["vqgan", "gpt", "clip"])
def test_a_run_on_two_data_sets_goes_on_with_both_of_them_only(
    stage: str, others: Path, tiny_dataset: DataSet, train, tmp_path: Path
) -> None:
    run = train(stage, f"data.also.path={others}", "trainer.max_steps=5")
    assert read_card(run / "model")["also"] == {"path": str(others), "fingerprint": DataSet.open(others).fingerprint}
    with pytest.raises(ConfigError, match="was begun as another run: also: fingerprint"):
        train(stage, f"data.also.path={tiny_dataset.folder}", resume=run)
    with pytest.raises(ConfigError, match=r"was begun as another run: data\.also"):
        train(stage, resume=run)
    others.rename(tmp_path / "moved")
    train(stage, f"data.also.path={tmp_path / 'moved'}", resume=run)


def test_a_share_that_leaves_nothing_of_a_data_set_is_refused_before_anything_is_written(
    others: Path, train, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"share 0\.01: that is 0 of 8 samples"):
        train("clip", f"data.also={{path: '{others}', share: 0.01}}")
    with pytest.raises(ConfigError, match=r"share 0\.9: that is 4 of 4 samples"):
        train("clip", f"data.also={{path: '{others}', share: 0.9}}", "trainer.accumulate=2")
    assert not (tmp_path / "runs").exists()


def test_a_second_data_set_beside_a_stream_is_refused(stream: str, others: Path, train) -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        train("clip", stream, f"data.also.path={others}")
