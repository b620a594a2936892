"""Every shipped configuration: it says how to run it and what it gave, loads, and survives saving."""

from functools import partial
from pathlib import Path

import pytest

from vqt2i.cli import parser_of
from vqt2i.config import load_config, save_config
from vqt2i.training.clip import CLIPRunConfig
from vqt2i.training.gpt import GPTRunConfig
from vqt2i.training.palette import load_tokenizer_run

ROOT = Path(__file__).parents[1]
LOADERS = {
    "vqgan": load_tokenizer_run, "gpt": partial(load_config, GPTRunConfig), "clip": partial(load_config, CLIPRunConfig),
}  # fmt: skip
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))


def test_every_stage_has_the_configurations_of_the_embedded_set_and_of_real_input() -> None:
    names = {stage: {path.stem for path in FILES if path.parent.name == stage} for stage in LOADERS}
    assert all({"shapes", "emoji"} <= found for found in names.values())
    assert {path.parent.name for path in FILES} == set(LOADERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_head_says_how_to_run_it_what_it_costs_and_what_it_scored(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    for start in ("# Run: ", "# Cost: ", "# Score: "):
        assert sum(line.startswith(start) and len(line) > len(start) + 3 for line in head) == 1
    command = next(line for line in head if line.startswith("# Run: ")).split()[2:]
    assert command[:2] == ["python", f"tools/train_{path.parent.name}.py"]
    args = parser_of(f"train_{path.parent.name}").parse_args(command[2:])
    assert (ROOT / args.config).resolve() == path


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_loads_and_its_resolved_form_is_equal(path: Path, tmp_path: Path) -> None:
    load = LOADERS[path.parent.name]
    config = load(path)
    save_config(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == config


def test_runs_of_different_configurations_have_different_names() -> None:
    names = [LOADERS[path.parent.name](path).name for path in FILES]
    assert len(set(names)) == len(names)
