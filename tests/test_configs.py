"""Every shipped configuration: it says how to run it and what it gave, loads, and survives saving."""

import shlex
from functools import partial
from pathlib import Path

import pytest

from vqt2i.cli import parser_of
from vqt2i.config import load_config, save_config
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.training.clip import CLIPRunConfig
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.training.palette import load_tokenizer_run
from vqt2i.training.prior import PriorRunConfig

ROOT = Path(__file__).parents[1]
RUNS = {
    "vqgan": load_tokenizer_run,
    "gpt": partial(load_config, GPTRunConfig),
    "clip": partial(load_config, CLIPRunConfig),
    "prior": partial(load_config, PriorRunConfig),
}
LOADERS = RUNS | {"sampling": partial(load_config, SamplingConfig)}
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))


def test_every_stage_has_the_configurations_of_the_embedded_set_and_those_of_a_pipeline_of_real_input() -> None:
    names = {stage: {path.stem for path in FILES if path.parent.name == stage} for stage in RUNS}
    assert all("shapes" in found for found in names.values())
    assert all("emoji" in names[stage] for stage in ("vqgan", "gpt", "clip"))
    assert {path.parent.name for path in FILES} == set(LOADERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_head_says_how_to_run_it_what_it_costs_and_what_it_scored(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    for start in ("# Run: ", "# Cost: ", "# Score: "):
        assert sum(line.startswith(start) and len(line) > len(start) + 3 for line in head) == 1
    command = shlex.split(next(line for line in head if line.startswith("# Run: ")).removeprefix("# Run: "))
    sampling = path.parent.name == "sampling"
    verb = command[1].removeprefix("tools/").removesuffix(".py")
    assert verb in ({"generate", "upscale"} if sampling else {f"train_{path.parent.name}"})
    assert command[:2] == ["python", f"tools/{verb}.py"]
    args = parser_of(verb).parse_args(command[2:])
    assert (ROOT / (args.sampling if sampling else args.config)).resolve() == path


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_loads_and_its_resolved_form_is_equal(path: Path, tmp_path: Path) -> None:
    load = LOADERS[path.parent.name]
    config = load(path)
    save_config(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == config


def test_runs_of_different_configurations_have_different_names() -> None:
    names = [RUNS[path.parent.name](path).name for path in FILES if path.parent.name in RUNS]
    assert len(set(names)) == len(names)
