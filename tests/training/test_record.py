"""run.json: what a run says of itself."""

import json
from pathlib import Path

import pytest

from vqt2i import __version__
from vqt2i.config import load_config
from vqt2i.data.shards import DataSet
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.text import TextTokenizer
from vqt2i.training.clip import CLIPRunConfig
from vqt2i.training.record import NAME, RunRecord, read_record, write_record


def test_a_run_says_what_was_run_on_what_and_from_which_step(
    train, tiny_dataset: DataSet, tiny_text: TextTokenizer
) -> None:
    run = train("clip", "trainer.max_steps=2")
    train("clip", "trainer.max_steps=4", "trainer.n_workers=1", resume=run)
    record = read_record(run)
    assert record.kind == "clip" and record.precision == "fp32"
    assert record.fingerprints == {"data": tiny_dataset.fingerprint, "text_tokenizer": tiny_text.fingerprint}
    assert [start.step for start in record.starts] == [0, 2]
    for start in record.starts:
        assert start.command.startswith("python ") and start.devices == 1
        assert start.versions["vqt2i"] == __version__ and {"python", "torch", "lightning"} <= start.versions.keys()
        assert {"host", "cpus", "gpus"} <= start.machine.keys()
    assert load_config(CLIPRunConfig, run / "config.yaml").trainer.n_workers == 1  # that of the newest start


def test_it_is_read_as_it_was_written_and_strictly(tmp_path: Path) -> None:
    record = RunRecord(kind="gpt", fingerprints={"data": "a"}, precision="bf16", starts=())
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    for content, told in (("{", "cannot be read"), ("{}", "kind: missing"), ('{"kind": 1, "code": 2}', "unknown key")):
        (tmp_path / NAME).write_text(content)
        with pytest.raises(CheckpointError, match=told):
            read_record(tmp_path)
    (tmp_path / NAME).unlink()
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be read"):
        read_record(tmp_path)


def test_a_run_whose_record_is_gone_is_not_gone_on_with(train) -> None:
    run = train("clip", "trainer.max_steps=1")
    content = json.loads((run / NAME).read_text())
    (run / NAME).write_text(json.dumps(content | {"fingerprints": {}}))
    with pytest.raises(ConfigError, match="data: fingerprint none before"):
        train("clip", resume=run)
    (run / NAME).unlink()
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be read"):
        train("clip", resume=run)
