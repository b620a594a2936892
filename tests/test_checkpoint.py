from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqt2i.checkpoint import CARD, CONFIG, WEIGHTS, load_model, read_card, require_same, save_model
from vqt2i.config import Config
from vqt2i.errors import CheckpointError


class NetConfig(Config):
    width: int = 64


class Net(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, config.width)
        self.register_buffer("count", torch.tensor(3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net(NetConfig())


def save(folder: Path, net: Net, **options: object) -> str:
    return save_model(folder, net, net.config, {"kind": "net"}, **options)


def load(folder: Path) -> Net:
    return load_model(folder, NetConfig, Net)


def test_saved_and_loaded_weights_config_and_fingerprint_are_equal(tmp_path: Path, net: Net) -> None:
    fingerprint = save(tmp_path / "m", net)
    loaded = load(tmp_path / "m")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in net.state_dict().items())
    assert loaded.config == net.config and not loaded.training
    assert loaded.fingerprint == fingerprint == read_card(tmp_path / "m")["fingerprint"]
    assert read_card(tmp_path / "m")["kind"] == "net"
    assert save(tmp_path / "again", loaded) == fingerprint


def test_the_fingerprint_changes_with_one_weight_and_with_the_configuration(tmp_path: Path, net: Net) -> None:
    first = save(tmp_path / "m", net)
    other_config = save_model(tmp_path / "c", net, NetConfig(width=65), {})
    with torch.no_grad():
        net.linear.weight[3, 5] += 1e-6
    assert len({first, other_config, save(tmp_path / "w", net)}) == 3


def test_bf16_halves_the_file_keeps_integers_and_loads_as_fp32(tmp_path: Path, net: Net) -> None:
    save(tmp_path / "fp32", net)
    save(tmp_path / "bf16", net, dtype=torch.bfloat16)
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("fp32", "bf16")]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.02)
    loaded = load(tmp_path / "bf16")
    assert loaded.linear.weight.dtype == torch.float32 and loaded.count == 3
    assert torch.equal(loaded.linear.weight, net.linear.weight.bfloat16().float())


def test_an_older_folder_is_replaced_whole(tmp_path: Path, net: Net) -> None:
    save(tmp_path / "m", net)
    (tmp_path / "m" / "stray").write_text("")
    save(tmp_path / "m", net)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {CONFIG, WEIGHTS, CARD}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("linear.bias"), r"linear\.bias: found nothing, .* expects \(64,\)"),
        (lambda state: state.update(extra=torch.zeros(2)), r"extra: found \(2,\), .* expects nothing"),
        (lambda state: state.update({"linear.bias": torch.zeros(3)}), r"linear\.bias: found \(3,\), .*\(64,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, net: Net, change, told: str) -> None:
    save(tmp_path / "m", net)
    state = load_file(tmp_path / "m" / WEIGHTS)
    change(state)
    save_file(state, tmp_path / "m" / WEIGHTS)
    with pytest.raises(CheckpointError, match=told):
        load(tmp_path / "m")


@pytest.mark.parametrize("content", [b"", b"not weights at all", None])
def test_damaged_weights_are_refused(tmp_path: Path, net: Net, content: bytes | None) -> None:
    save(tmp_path / "m", net)
    path = tmp_path / "m" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: damaged or not safetensors"):
        load(tmp_path / "m")


@pytest.mark.parametrize("content", [b"width: many", b"witdh: 3", b"\xff\xfe", b"[1]"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, net: Net, content: bytes) -> None:
    save(tmp_path / "m", net)
    (tmp_path / "m" / CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=CONFIG):
        load(tmp_path / "m")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_or_folder_is_named(tmp_path: Path, net: Net, name: str) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        load(tmp_path / "m")
    save(tmp_path / "m", net)
    (tmp_path / "m" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: No such file"):
        load(tmp_path / "m")


def test_a_card_that_is_missing_or_no_object_is_refused(tmp_path: Path, net: Net) -> None:
    save(tmp_path / "m", net)
    for content in ("{", "[1, 2]"):
        (tmp_path / "m" / CARD).write_text(content)
        with pytest.raises(CheckpointError, match=CARD):
            read_card(tmp_path / "m")
    (tmp_path / "m" / CARD).unlink()
    with pytest.raises(CheckpointError, match=CARD):
        read_card(tmp_path / "m")


def test_different_fingerprints_are_told_with_both() -> None:
    require_same("text tokenizer", "gpt", found="a" * 64, expected="a" * 64, hint="")
    with pytest.raises(CheckpointError, match=r"gpt: made with text tokenizer bbbbbbbb, but this is aaaaaaaa; do so"):
        require_same("text tokenizer", "gpt", found="a" * 64, expected="b" * 64, hint="do so")
