"""Where a run starts: in a new folder, or from a checkpoint of an earlier run that is the same run."""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vqt2i.checkpoint import CARD, read_card
from vqt2i.config import Config, load_config, save_config
from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.runtime import Precision, is_first_process, pick_precision, say
from vqt2i.training.checkpoints import checkpoints_in, damage, set_aside, step_of
from vqt2i.training.metrics import METRICS, keep_metrics_before
from vqt2i.training.record import RunRecord, describe_start, read_record, write_record
from vqt2i.training.strategy import keeps_states_on_nvme

Resume = Literal["auto", "never"] | Path

# What may differ when a run goes on: where things are (fingerprints compare their content), how far and how often, how
# it is computed. `max_steps` moves the rest of the learning-rate schedule.
MAY_CHANGE = (
    "name", "data.path", "data.also.path", "text_tokenizer", "image_tokenizer", "condition.scorer", "sampling",
    "training.compile", "training.start_from",
    "trainer.max_steps", "trainer.devices", "trainer.n_workers", "trainer.n_validation_samples",
    "trainer.validate_every_steps", "trainer.checkpoint_every_steps", "trainer.log_every_steps",
    "trainer.log_to", "trainer.keep_last", "trainer.max_nonfinite_steps", "trainer.rank_timeout_s",
    "trainer.precision",  # compared as resolved: see require_same_run
)  # fmt: skip


class Start(NamedTuple):
    """The run folder, and the checkpoint to go on from, if any."""

    folder: Path
    checkpoint: Path | None

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


def begin_run(
    runs: Path, name: str, resume: Resume, config: Config, card: dict[str, Any], device_type: str, *,
    n_devices: int, deepspeed: dict[str, Any] | None,
) -> tuple[Start, Precision]:  # fmt: skip
    """Find where the run starts, check that it may, and write config.yaml and run.json into its folder.

    Args:
        config: of the run, with its `trainer`. card: names the kind and, with fingerprints, what the run is made from.
        deepspeed: its configuration, where it is used.

    Raises:
        CheckpointError: nothing whole to go on from. ConfigError: what is to be gone on with is another run.
    """
    trainer = config.trainer
    start = find_start(runs, name, resume, trainer.max_steps)
    fingerprints = {k: v["fingerprint"] for k, v in card.items() if isinstance(v, dict) and "fingerprint" in v}
    if start.checkpoint is not None:
        record = read_record(start.folder)
        require_same_run(start, record, config, fingerprints, n_devices=n_devices, deepspeed=deepspeed)
    else:
        # "auto" is measured, and might come out otherwise at the next start
        precision = pick_precision(trainer.precision, device_type)
        record = RunRecord(kind=card["kind"], fingerprints=fingerprints, precision=precision, starts=())
    if is_first_process():
        for later in checkpoints_in(start.folder):
            if step_of(later) > start.step:
                set_aside(later, f"later than step {start.step:,}, which is gone on from")
        begun = describe_start(start.step, n_devices)
        save_config(config, start.folder / "config.yaml")
        write_record(start.folder, record.model_copy(update={"starts": (*record.starts, begun)}))
        keep_metrics_before(start.folder / METRICS, start.step)
    return start, record.precision


def find_start(runs: Path, name: str, resume: Resume, max_steps: int) -> Start:
    """Where a run called NAME starts.

    "never": in a new folder. "auto": from the newest checkpoint of the newest run of this name, unless that run has
    come to `max_steps`; else, and that is said, in a new folder. A path: from the newest checkpoint of that run folder,
    or from that checkpoint. Damaged checkpoints that stand in the way of an older one are set aside.

    Raises:
        CheckpointError: a path that is no run folder and no checkpoint, one without a whole checkpoint.
    """
    if resume == "never":
        return Start(new_run_folder(runs, name), None)
    if resume == "auto":
        folder = newest_run_folder(runs, name)
        checkpoint = None if folder is None else newest_whole_checkpoint(folder)
        if checkpoint is None:
            why = f"no run called {name} with a checkpoint in {runs}"
        elif step_of(checkpoint) >= max_steps and is_exported(folder, step_of(checkpoint)):
            why = f"{folder} is finished ({step_of(checkpoint):,} steps)"
        else:
            return Start(folder, checkpoint)
        say(f"--resume auto: {why}; starting anew")
        return Start(new_run_folder(runs, name), None)
    if checkpoints_in(resume):
        checkpoint = newest_whole_checkpoint(resume)
        if checkpoint is None:
            raise CheckpointError(f"{resume}: all its checkpoints are damaged; start anew without --resume")
        return Start(resume, checkpoint)
    if resume.name.startswith("step-") and resume.parent.name == "checkpoints" and resume.exists():
        problem = damage(resume) if is_first_process() else None
        if problem is not None:
            raise CheckpointError(f"{resume}: damaged ({problem}); name another, or the run folder for the newest")
        return Start(resume.parents[1], resume)
    what = "no checkpoint in it" if resume.is_dir() else "no such run"
    raise CheckpointError(f"--resume {resume}: {what}; expected a run folder, or RUN/checkpoints/step-....ckpt")


def new_run_folder(runs: Path, name: str) -> Path:
    """`runs/NAME`, or `runs/NAME-2`, ... if that is taken: no run overwrites another."""
    folder, count = runs / name, 1
    while folder.exists():
        count += 1
        folder = runs / f"{name}-{count}"
    return folder


def newest_run_folder(runs: Path, name: str) -> Path | None:
    """The newest run called NAME that has a checkpoint."""
    called = re.compile(rf"{re.escape(name)}(-\d+)?")  # as `new_run_folder` names them
    folders = [f for f in runs.glob("*") if called.fullmatch(f.name) and checkpoints_in(f)]
    return max(folders, key=lambda f: checkpoints_in(f)[-1].stat().st_mtime, default=None)


def newest_whole_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is not damaged. The first process looks, and sets damaged ones aside."""
    for checkpoint in reversed(checkpoints_in(run)):
        problem = damage(checkpoint) if is_first_process() else None
        if problem is None:
            return checkpoint
        set_aside(checkpoint, f"damaged ({problem})")
    return None


def is_exported(run: Path, step: int) -> bool:
    """Whether the run's model is that of this step: a run may be killed between its last checkpoint and its export."""
    return (run / "model" / CARD).is_file() and read_card(run / "model").get("steps") == step


def require_same_run(
    start: Start, record: RunRecord, config: Config, fingerprints: dict[str, str], *,
    n_devices: int, deepspeed: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Check that what is gone on with is the run that was begun.

    Raises:
        ConfigError: other settings, data, tokenizers or engine; all differences are named.
    """
    begun = _dotted(load_config(type(config), start.folder / "config.yaml").model_dump(mode="json"))
    given = _dotted(config.model_dump(mode="json"))
    differences = [
        f"{key}: {begun.get(key)} before, {given.get(key)} now"
        for key in sorted(begun.keys() | given.keys())
        if begun.get(key) != given.get(key) and not any(f"{key}.".startswith(f"{may}.") for may in MAY_CHANGE)
    ]
    precision = config.trainer.precision
    if precision not in ("auto", record.precision):
        differences.append(f"trainer.precision: {record.precision} before, {precision} now")
    for what, fingerprint in fingerprints.items():
        if record.fingerprints.get(what) != fingerprint:
            before = record.fingerprints.get(what, "none")
            differences.append(f"{what}: fingerprint {before[:8]} before, {fingerprint[:8]} now")
    devices_before = record.starts[-1].devices
    if config.data.stream:  # which samples a step reads follows from them
        workers_before = begun["trainer.n_workers"]
        if max(workers_before, 1) != max(config.trainer.n_workers, 1):  # 0 is this process, as one worker
            differences.append(f"trainer.n_workers: {workers_before} before, {config.trainer.n_workers} now; "
                               "data.stream needs as many")  # fmt: skip
        if devices_before != n_devices:
            differences.append(f"devices: {devices_before} before, {n_devices} now; data.stream needs as many")
    if start.checkpoint.is_dir() != (deepspeed is not None):
        before, now = ("with", "without") if deepspeed is None else ("without", "with")
        differences.append(f"{before} DeepSpeed before, {now} now")
    elif deepspeed is not None and keeps_states_on_nvme(deepspeed) and devices_before != n_devices:
        differences.append(f"devices: {devices_before} before, {n_devices} now, but of the optimizer's state on "
                           "NVMe each rank goes on with its own")  # fmt: skip
    if differences:
        raise ConfigError(f"{start.folder} was begun as another run: {'; '.join(differences)}. Resume it with "
                          f"--config {start.folder / 'config.yaml'} and what it was begun with")  # fmt: skip


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
