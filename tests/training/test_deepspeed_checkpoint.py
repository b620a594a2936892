"""Checkpoints of the real engine: gone on from by another number of ranks, exported by one process, read as data."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.config import load_config
from vqt2i.errors import ConfigError
from vqt2i.files import PARTIAL_PREFIX
from vqt2i.training import run as training_run
from vqt2i.training.checkpoints import FILES, checkpoint_path, checkpoints_in, step_of
from vqt2i.training.deepspeed_checkpoint import only_data_is_loaded
from vqt2i.training.export import export_checkpoint
from vqt2i.training.gpt import GPTModule, train_gpt
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.training.start import Resume
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

SETTINGS = [
    "trainer={max_steps: 6, batch_size: 8, validate_every_steps: 2, n_validation_samples: 6, precision: fp32}",
    "trainer.keep_last=9",
    "training.optimizer.weight_decay=0.5",  # a mistaken one is to be seen
    # parts whose mean does not depend on how the rows are dealt out to ranks
    "training.reversed_share=0", "training.loss={text: 0, z: 0}", "training.null_share=0",
]  # fmt: skip
KINDS = {
    "plain": [],
    "zero-0": ["deepspeed.zero_stage=0"],
    "zero-1": ["deepspeed.zero_stage=1"],
    "zero-2": ["deepspeed.zero_stage=2"],
    "zero-3": ["deepspeed.zero_stage=3"],
    "zero-2-offloaded": ["deepspeed={zero_stage: 2, offload_optimizer: cpu}"],
    "zero-3-offloaded": ["deepspeed={zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}"],
    "zero-3-bf16": ["deepspeed.zero_stage=3", "trainer.precision=bf16"],
}
# the runs of each phase: on how many ranks, and from which step of which phase
PHASES = {"whole": (1, None), "wider": (2, ("whole", 2)), "narrower": (1, ("wider", 4))}


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory, model_folders: Path, tiny_dataset) -> Path:
    """A folder of runs for each of `PHASES`, trained in processes of their own, and of what they exported."""
    folder = tmp_path_factory.mktemp("phases")
    common = [
        f"data.path={tiny_dataset.folder}", f"text_tokenizer={model_folders / 'text' / 'text.model'}",
        f"image_tokenizer={model_folders / 'vq'}", "text_length=12",
        "transformer={width: 32, n_layers: 2, n_heads: 2, mlp_width: 48}",
        "training.optimizer={learning_rate: 0.005, warmup_steps: 2}",
    ]  # fmt: skip
    job = {"folder": str(folder), "settings": common + SETTINGS}
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=900)
    return folder


def validations(run: Path) -> dict[int, list[float]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/image"]]
    return {int(row["step"]) + 1: [float(row["val/image"]), float(row["val/image_unconditional"])] for row in rows}


@pytest.mark.parametrize("phase", ["wider", "narrower"])
def test_a_run_goes_on_with_another_number_of_ranks_as_if_nothing_had_changed(
    phase: str, phases: Path, weights
) -> None:
    for kind in KINDS:
        expected, found = (validations(phases / name / kind) for name in ("whole", phase))
        exact = "bf16" not in kind
        assert list(found) == [2, 4, 6]
        for step in expected:
            assert found[step] == pytest.approx(expected[step], rel=1e-6 if exact else 1e-2), (kind, step)
        expected, found = (weights(phases / name / kind) for name in ("whole", phase))
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-6 if exact else 0.02), (kind, name)
        start = json.loads((phases / phase / kind / "run.json").read_text())["starts"][-1]
        assert (start["devices"], start["step"]) == (PHASES[phase][0], PHASES[phase][1][1])
        assert not list((phases / phase / kind).rglob(f"{PARTIAL_PREFIX}*"))


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_exports_the_checkpoints_of_two_ranks_as_they_did(kind: str, phases: Path, tmp_path: Path) -> None:
    run = phases / "wider" / kind
    assert [step_of(path) for path in checkpoints_in(run)] == [2, 4, 6]
    for step in (4, 6):
        card = read_card(phases / "exports" / f"wider-{kind}-{step}")
        assert export_checkpoint(run, step, tmp_path / str(step)) == card["fingerprint"]
        assert read_card(tmp_path / str(step))["metrics"] == card["metrics"]


def test_nothing_is_executed_even_where_the_caller_would_allow_it(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"stage": ZeroStageEnum.weights}, tmp_path / "good.pt")
    torch.save(Evil(), tmp_path / "evil.pt")
    with only_data_is_loaded():
        assert torch.load(tmp_path / "good.pt", weights_only=False) == {"stage": 3}
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "executed").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_states_on_nvme_are_not_gone_on_with_by_another_number_of_ranks(train, tmp_path: Path) -> None:
    nvme = [f"deepspeed={{zero_stage: 3, offload_optimizer: nvme, nvme_path: {tmp_path}}}"]
    run = train("gpt", "trainer.max_steps=1", *nvme)
    checkpoint_path(run, 1).unlink()
    checkpoint_path(run, 1).mkdir()
    (checkpoint_path(run, 1) / FILES).write_text("{}")  # looks like one of DeepSpeed's
    with pytest.raises(ConfigError, match=r"devices: 1 before, 2 now, but of the optimizer's state on NVMe"):
        train("gpt", "trainer.devices=2", *nvme, resume=run, deepspeed=True)


def train_phase(phase: str, folder: Path, settings: list[str]) -> None:
    """One start of each kind of run; a rank of its own in every process that comes here."""
    torch.set_num_threads(1)
    n_ranks, origin = PHASES[phase]

    def save(path: Path, model: torch.nn.Module, config: object, card: dict) -> str:
        save_model(folder / "exports" / f"{phase}-{path.parent.name}-{card['steps']}", model, config, card)
        return save_model(path, model, config, card)

    training_run.save_model = save
    GPTModule.sample_images = None  # pictures take longer than the rest
    if origin is not None and "LOCAL_RANK" not in os.environ:  # of all kinds, for a further rank may be ahead
        for kind in KINDS:
            shutil.copytree(folder / origin[0] / kind, folder / phase / kind)
            for later in checkpoints_in(folder / phase / kind):
                if step_of(later) > origin[1]:
                    shutil.rmtree(later) if later.is_dir() else later.unlink()
    for kind, more in KINDS.items():
        resume: Resume = "never" if origin is None else checkpoint_path(folder / phase / kind, origin[1])
        config = load_config(GPTRunConfig, None, [*settings, *more, f"name={kind}", f"trainer.devices={n_ranks}"])
        vq = load_model(config.image_tokenizer, ImageTokenizerConfig, ImageTokenizer)
        deepspeed = kind != "plain"
        train_gpt(config, config.image_tokenizer, vq, folder / phase, resume=resume, deepspeed=deepspeed)


if __name__ == "__main__":  # the processes of the tests above
    import deepspeed  # noqa: F401  (paid for once, and not by every phase)

    job = json.loads(sys.argv[1])
    arguments = (Path(job["folder"]), job["settings"])
    if "PHASE" in os.environ:  # a further rank
        train_phase(os.environ["PHASE"], *arguments)
    else:
        for phase in PHASES:
            os.environ["PHASE"] = phase
            process = get_context("fork").Process(target=train_phase, args=(phase, *arguments))
            process.start()
            process.join()
            assert process.exitcode == 0, phase
