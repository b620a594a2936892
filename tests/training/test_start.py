"""A run that was killed goes on as if it had not been: processes of their own, killed for real."""

import json
import os
import random
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from vqt2i.checkpoint import load_model
from vqt2i.config import load_config
from vqt2i.training.clip import CLIPModule, CLIPRunConfig, train_clip
from vqt2i.training.gpt import GPTModule, train_gpt
from vqt2i.training.gpt_config import GPTRunConfig
from vqt2i.training.start import Resume
from vqt2i.training.vqgan import VQGANModule, VQGANRunConfig, train_vqgan
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig

STEPS = ["trainer.checkpoint_every_steps=3", "trainer.log_every_steps=1"]
MORE = {
    "vqgan": ["training.loss.adversarial={channels: 4, n_layers: 2, start_share: 0.3}"],
    "gpt": ["transformer.dropout=0.2"],
    "gpt-deepspeed": ["transformer.dropout=0.2"],
    "clip": ["vision.dropout=0.2", "text.dropout=0.2"],
    "gpt-zero-3": ["transformer.dropout=0.2", "deepspeed.zero_stage=3"],
    "gpt-zero-3-offloaded": [
        "transformer.dropout=0.2", "deepspeed={zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}",
    ],
}  # fmt: skip
MODULES = {"vqgan": VQGANModule, "gpt": GPTModule, "clip": CLIPModule}


@pytest.fixture(scope="module")
def kill_steps() -> dict[str, int]:
    """After which step each run is killed, before its checkpoint is due: anywhere between the first and the last."""
    rng = random.Random(0)
    return {name: rng.randint(4, 9) for name in MORE}


def test_a_run_killed_at_any_step_and_resumed_equals_one_that_was_not(
    overrides, weights, kill_steps: dict[str, int], tmp_path: Path
) -> None:
    settings = {name: [*overrides[name.split("-")[0]], *STEPS, *more] for name, more in MORE.items()}
    job = {"folder": str(tmp_path), "settings": settings, "kill_steps": kill_steps}
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=900)
    for name in MORE:
        whole, resumed = (tmp_path / runs / name for runs in ("whole", "killed"))
        expected, found = weights(whole), weights(resumed)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], name
        assert (resumed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text(), name
        starts = json.loads((resumed / "run.json").read_text())["starts"]
        assert [start["step"] for start in starts] == [0, (kill_steps[name] - 1) // 3 * 3], name


def train_stage(name: str, settings: list[str], runs: Path, resume: Resume) -> None:
    torch.set_num_threads(1)
    stage, _, deepspeed = name.partition("-")
    settings = [*settings, f"name={name}"]
    if stage == "vqgan":
        train_vqgan(load_config(VQGANRunConfig, None, settings), runs, resume=resume)
    elif stage == "clip":
        train_clip(load_config(CLIPRunConfig, None, settings), runs, resume=resume)
    else:
        config = load_config(GPTRunConfig, None, settings)
        vq = load_model(config.image_tokenizer, ImageTokenizerConfig, ImageTokenizer)
        if config.deepspeed.zero_stage == 3:
            GPTModule.sample_images = None  # each of its steps gathers all weights
        train_gpt(config, config.image_tokenizer, vq, runs, resume=resume, deepspeed=bool(deepspeed))


def train_and_be_killed(name: str, settings: list[str], runs: Path, step: int) -> None:
    def on_train_batch_end(self, outputs: object, batch: object, batch_index: int) -> None:
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    MODULES[name.split("-")[0]].on_train_batch_end = on_train_batch_end
    train_stage(name, settings, runs, "never")


def exit_code_of(function: object, *arguments: object) -> int:
    """Of a process of its own; forked, so that the imports are paid once."""
    process = get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


if __name__ == "__main__":  # the processes of the test above
    import deepspeed  # noqa: F401  (paid for once)

    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    for name, settings in job["settings"].items():
        assert exit_code_of(train_stage, name, settings, folder / "whole", "never") == 0
        killed = exit_code_of(train_and_be_killed, name, settings, folder / "killed", job["kill_steps"][name])
        assert killed == -signal.SIGKILL
        assert exit_code_of(train_stage, name, settings, folder / "killed", "auto") == 0
