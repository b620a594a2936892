"""Training of the scorer."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from vqt2i.clip import CLIP, CLIPConfig, contrastive_loss, modality_gap
from vqt2i.clip.loss import recall_at, same_captions
from vqt2i.config import Config, build_config
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.runtime import say
from vqt2i.text import TextTokenizer
from vqt2i.training.batches import Batch
from vqt2i.training.compiled import compile_for_training
from vqt2i.training.launch import find_world
from vqt2i.training.optim import OptimizerConfig, scheduled_optimizer
from vqt2i.training.run import DataConfig, StageData, TrainerConfig, fit, open_dataset, stage_card
from vqt2i.training.samples import image_samples
from vqt2i.training.start import Resume
from vqt2i.training.strategy import DeepSpeedConfig, choose_deepspeed, wants_cpu_adam
from vqt2i.training.throughput import SampleWork, count_flops


class CLIPTrainingConfig(Config):
    """plateau_steps: after so many without leaving ln(batch), the loss of guessing, an alarm is given.

    compile: the step with torch.compile.
    """

    optimizer: OptimizerConfig = OptimizerConfig(beta2=0.98, weight_decay=0.1)
    plateau_steps: PositiveInt = 300
    plateau_share: float = Field(0.95, gt=0, lt=1)
    compile: bool = False


class CLIPRunConfig(Config):
    """`configs/clip/NAME.yaml`."""

    name: str = "clip"
    data: DataConfig = DataConfig()
    text_tokenizer: Path = Path("tokenizers/bilingual.model")
    image_size_px: PositiveInt = 32
    patch_size_px: PositiveInt = 4
    text_length: PositiveInt = 32
    vision: TransformerConfig = TransformerConfig(width=128, n_layers=4, n_heads=4, mlp_width=320)
    text: TransformerConfig = TransformerConfig(width=128, n_layers=3, n_heads=4, mlp_width=320)
    embedding_width: PositiveInt = 128
    training: CLIPTrainingConfig = CLIPTrainingConfig()
    trainer: TrainerConfig = TrainerConfig(batch_size=256)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()


class CLIPModule(L.LightningModule):
    """Joins the scorer and its loss; features are gathered over ranks, so the batch is that of all of them."""

    best_by = "val/loss"  # the checkpoint with the least is kept
    exported = "clip"  # by this name the exported model is in a checkpoint
    cpu_adam = False  # set where DeepSpeed offloads the optimizer

    def __init__(self, clip: CLIP, config: CLIPTrainingConfig, max_steps: int) -> None:
        super().__init__()
        self.clip, self.config, self.max_steps = clip, config, max_steps
        self.training_encoders = (clip.encode_image, clip.encode_text)
        if config.compile:
            self.training_encoders = tuple(map(compile_for_training, self.training_encoders))
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._last_loss: Tensor | None = None
        self._last_n_pairs = 0

    def configure_optimizers(self) -> Any:
        return scheduled_optimizer(self.clip, self.config.optimizer, self.max_steps, cpu_adam=self.cpu_adam)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        encode_image, encode_text = self.training_encoders
        image_BE, text_BE = encode_image(batch.image), encode_text(*batch.text)
        image_BE, text_BE, ids_BS = (self._gathered(x) for x in (image_BE, text_BE, batch.text.ids_BS))
        out = contrastive_loss(image_BE, text_BE, self.clip.logit_scale(), same_captions(ids_BS))
        self._last_loss, self._last_n_pairs = out.loss.detach(), len(image_BE)
        self.log_dict(
            {"train/loss": out.loss.detach(), "train/accuracy": out.accuracy, "train/scale": self.clip.logit_scale()}
        )
        return out.loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        image_BE = self.clip.encode_image(batch.image)
        self._seen.append((image_BE, self.clip.encode_text(*batch.text), batch.text.ids_BS))

    def on_validation_epoch_end(self) -> None:
        image_BE, text_BE, ids_BS = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        image_BE, text_BE, ids_BS = (self._gathered(x) for x in (image_BE, text_BE, ids_BS))
        right, similarity = same_captions(ids_BS), image_BE @ text_BE.T
        values = {"val/loss": contrastive_loss(image_BE, text_BE, self.clip.logit_scale(), right).loss}
        for k in (1, 5):
            values[f"val/image_to_text_r{k}"] = recall_at(similarity, right, k)
            values[f"val/text_to_image_r{k}"] = recall_at(similarity.T, right, k)
        gap = modality_gap(image_BE, text_BE)
        values |= {f"val/gap_{name}": value for name, value in gap._asdict().items() if name != "shift_E"}
        self.log_dict(values)
        if self._last_loss is not None:  # the training loss: overfitting raises that of validation above guessing too
            self._watch_plateau(float(self._last_loss), self._last_n_pairs)

    def export_model(self) -> CLIP:
        return self.clip

    def sample_work(self) -> SampleWork:
        return SampleWork("images", None, clip_flops(self.clip.config))

    def _watch_plateau(self, loss: float, n_pairs: int) -> None:
        guessing = float(torch.tensor(float(n_pairs)).log())
        if self.global_step >= self.config.plateau_steps and loss > self.config.plateau_share * guessing:
            say(f"ALARM: after {self.global_step:,} steps the scorer still guesses (loss {loss:.2f}, guessing gives "
                f"{guessing:.2f}); try a larger batch, a longer warm-up or a lower learning rate")  # fmt: skip

    def _gathered(self, x: Tensor) -> Tensor:
        return self.all_gather(x, sync_grads=True).flatten(0, 1) if self.trainer.world_size > 1 else x


@cache
def clip_flops(config: CLIPConfig) -> int:
    """Floating-point operations of one pair's forward and backward pass, but for its similarities with the others."""
    with torch.device("meta"):
        clip = CLIP(config)
        image = torch.zeros(1, 3, config.image_size_px, config.image_size_px)
        ids, n_ids = torch.zeros(1, config.text_length, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    return count_flops(lambda: (clip.encode_image(image) * clip.encode_text(ids, n_ids)).sum().backward())


def train_clip(config: CLIPRunConfig, runs: Path, *, resume: Resume, deepspeed: bool | Path = False) -> Path:
    """Train as configured; returns the run's folder. `deepspeed`: a user's own JSON, or true for the generated one."""
    dataset = open_dataset(config.data)
    tokenizer = TextTokenizer.load(config.text_tokenizer)
    values = {
        "image_size_px": config.image_size_px,
        "patch_size_px": config.patch_size_px,
        "text_length": config.text_length,
        "n_text_ids": tokenizer.n_ids,
        "vision": config.vision,
        "text": config.text,
        "embedding_width": config.embedding_width,
        "text_tokenizer": tokenizer.fingerprint,
    }
    clip_config = build_config(CLIPConfig, values, "scorer")
    L.seed_everything(config.trainer.seed, verbose=False)
    samples = image_samples(config.data, dataset, config.image_size_px, tokenizer, config.trainer.seed)
    tokenizer_card = {"path": str(config.text_tokenizer), "fingerprint": tokenizer.fingerprint}
    module = CLIPModule(CLIP(clip_config), config.training, config.trainer.max_steps)
    n_devices = find_world(config.trainer.devices).size
    micro_batch_size = config.trainer.micro_batch_size(n_devices)
    ds_json = choose_deepspeed(deepspeed, config.deepspeed, config.training.optimizer, micro_batch_size)
    module.cpu_adam = wants_cpu_adam(ds_json)
    return fit(
        module,
        StageData(*samples, config.trainer, config.text_length),
        run_config=config,
        model_config=clip_config,
        card=stage_card("clip", dataset, config.data, text_tokenizer=tokenizer_card),
        runs=runs,
        name=config.name,
        resume=resume,
        deepspeed=ds_json,
    )
