"""Training of the image tokenizer: VQ-VAE, or VQGAN where the loss has an adversarial part."""

import copy
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from einops import rearrange
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from vqt2i.checkpoint import load_model
from vqt2i.config import Config
from vqt2i.training.batches import Batch
from vqt2i.training.finetune import find_base, require_described
from vqt2i.training.optim import AdamWConfig, OptimizerConfig, build_optimizer, learning_rate_at
from vqt2i.training.run import DataConfig, StageData, TrainerConfig, fit, open_dataset, stage_card
from vqt2i.training.samples import image_samples
from vqt2i.training.start import Resume
from vqt2i.training.throughput import SampleWork, count_flops
from vqt2i.vq.autoencoder import ImageTokenizer, VQOutput
from vqt2i.vq.config import ImageTokenizerConfig
from vqt2i.vq.discriminator import PatchDiscriminator
from vqt2i.vq.losses import (
    ReconstructionLoss,
    VQGANLossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from vqt2i.vq.metrics import CodebookCounter, psnr, ssim


class VQGANTrainingConfig(Config):
    """optimizer: of the tokenizer and, with the same settings, of the critic.

    ema_decay: of the averaged weights that are validated and exported; shorter memory in the first steps.
    max_gradient_norm: gradients are scaled down to this norm; null leaves them.
    start_from: an image tokenizer to go on training from, instead of random weights: its model folder, its run or its
        pipeline folder. trained: "decoder" leaves encoder and codebook as they are: ids keep their meaning, and a GPT
        that was trained on them draws through the new decoder too.
    """

    optimizer: AdamWConfig = OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.0)
    loss: VQGANLossConfig = VQGANLossConfig()
    ema_decay: float = Field(0.995, ge=0, lt=1)
    max_gradient_norm: PositiveFloat | None = 1.0
    start_from: Path | None = None
    trained: Literal["all", "decoder"] = "all"

    @model_validator(mode="after")
    def _what_stays_has_been_trained(self) -> "VQGANTrainingConfig":
        if self.trained == "decoder" and self.start_from is None:
            raise ValueError("trained: decoder is for a trained image tokenizer; give its folder as start_from")
        return self


class VQGANRunConfig(Config):
    """`configs/vqgan/NAME.yaml`."""

    name: str = "vqgan"
    data: DataConfig = DataConfig()
    model: ImageTokenizerConfig = ImageTokenizerConfig()
    training: VQGANTrainingConfig = VQGANTrainingConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _whose_ids_they_are_follows(self) -> "VQGANRunConfig":
        if self.model.ids_of is not None:
            raise ValueError("model.ids_of is written by training.trained: decoder; leave it out")
        return self

    @model_validator(mode="after")
    def _loss_is_of_what_the_decoder_says(self) -> "VQGANRunConfig":
        weight = self.training.loss.logit_laplace_weight
        if (self.model.output == "logit_laplace") != (weight > 0):
            raise ValueError(f"model.output is {self.model.output!r} and training.loss.logit_laplace_weight {weight}; "
                             "that weight is above 0 where output is 'logit_laplace', and 0 elsewhere")  # fmt: skip
        return self


class VQGANModule(L.LightningModule):
    """Reads the images of a batch, float in [-1, 1]. Everything needed for an exact resume is in the checkpoint.

    `trainer.global_step` counts updates of the tokenizer: the critic is stepped past Lightning, which would otherwise
    count each batch twice and stop at half of `max_steps`. Under DDP with an adversarial loss, use
    `find_unused_parameters=True`: each of the two backward passes reaches a part of the parameters.
    """

    best_by = "val/loss"  # the checkpoint with the least is kept
    exported = "averaged"  # by this name the exported model is in a checkpoint

    def __init__(self, model: ImageTokenizer, config: VQGANTrainingConfig, max_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.max_steps = max_steps
        self.model = model
        if config.trained == "decoder":
            model.encoder.requires_grad_(False)
            model.quantizer.requires_grad_(False)
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        self.reconstruction_loss = ReconstructionLoss(config.loss)
        adversarial = config.loss.adversarial
        self.discriminator = None if adversarial is None else PatchDiscriminator(adversarial)
        self.codes_seen = CodebookCounter(model.config.vocab_size)  # in validation
        self.codes_trained = CodebookCounter(model.config.vocab_size)  # since the last row of metrics
        self.n_restarted = 0  # codes, since then

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        trained = [self.model] if self.discriminator is None else [self.model, self.discriminator]
        return [build_optimizer(module, self.config.optimizer) for module in trained]

    @property
    def discriminator_started(self) -> bool:
        adversarial = self.config.loss.adversarial
        return adversarial is not None and self.global_step >= adversarial.start_share * self.max_steps

    def training_step(self, batch: Batch, batch_index: int) -> None:
        x, step = batch.image, self.global_step  # which the tokenizer's update below advances
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        learning_rate = learning_rate_at(self.config.optimizer, step, self.max_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        adversarial_now = self.discriminator_started

        if self.config.trained == "decoder":  # in training mode codes move without any gradient
            self.model.encoder.eval()
            self.model.quantizer.eval()
        out = self.model(x, step / self.max_steps)
        loss, parts = self._tokenizer_loss(x, out, adversarial_now)
        # the rate as a tensor, for Lightning would copy a float to the GPU and wait for it
        logs = {"train/loss": loss.detach(), **parts, "train/lr": torch.tensor(learning_rate)}
        self._update(optimizers[0], self.model, loss + out.quantizer_loss)
        self._average(step)
        if adversarial_now:
            loss_critic = self._critic_loss(x, out)
            logs |= {"train/discriminator": loss_critic.detach()}
            self._update(optimizers[1].optimizer, self.discriminator, loss_critic)
        self.log_dict(logs)
        self._watch_codebook(out)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        x = batch.image
        out = self.export_model()(x)
        reconstruction = out.reconstruction_B3HW.clamp(-1, 1)
        self.codes_seen.update(out.ids_BHW)
        values = {
            "val/loss": self.reconstruction_loss(out, x),
            "val/psnr": psnr(reconstruction, x).mean(),
            "val/ssim": ssim(reconstruction, x).mean(),
        }
        self.log_dict(values, on_epoch=True, sync_dist=True, batch_size=len(x))

    def on_train_start(self) -> None:
        phases = [False] if self.discriminator is None else [False, True]
        self._flops = [self._count_flops(adversarial) for adversarial in phases]  # on all ranks: adaptive_weight waits

    def sample_work(self) -> SampleWork:
        return SampleWork("images", None, self._flops[self.discriminator_started])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["codes_trained"] = {"counts_K": self.codes_trained.total(), "n_restarted": self.n_restarted}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["codes_trained"]  # the counts of all ranks: the first one goes on with them
        self.n_restarted = saved["n_restarted"]
        if self.trainer.is_global_zero:
            self.codes_trained.counts_K = saved["counts_K"]

    def on_validation_epoch_start(self) -> None:
        self.codes_seen.reset()

    def on_validation_epoch_end(self) -> None:
        seen = self.codes_seen.compute()
        values = {"val/usage": seen.usage, "val/perplexity": seen.perplexity, "val/dead_codes": float(seen.dead_codes)}
        self.log_dict(values)

    def export_model(self) -> ImageTokenizer:
        """The tokenizer with averaged weights, in evaluation mode. Not a copy: training moves it on."""
        return self.averaged.eval()

    @torch.no_grad()
    def sample_images(self, batch: Batch, max_images: int = 16) -> Tensor:
        """One picture (3, 2H, n * W) in [-1, 1]: inputs over their reconstructions by the averaged weights."""
        x = batch.image[:max_images]
        reconstruction = self.export_model()(x).reconstruction_B3HW.float().clamp(-1, 1)
        return rearrange([x, reconstruction], "row b c h w -> c (row h) (b w)")

    def _tokenizer_loss(self, x: Tensor, out: VQOutput, adversarial: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss without the quantizer's, and the parts of it to log."""
        loss = self.reconstruction_loss(out, x)
        parts = {"train/reconstruction": loss.detach(), "train/quantizer": out.quantizer_loss.detach()}
        parts |= {f"train/{name}": value for name, value in out.measures.items()}
        if adversarial:
            self.discriminator.requires_grad_(False)
            generator, weight = self._adversarial_loss(out.reconstruction_B3HW, loss)
            self.discriminator.requires_grad_(True)
            parts |= {"train/generator": generator.detach(), "train/adaptive_weight": weight}
            loss = loss + weight * generator
        return loss, parts

    def _critic_loss(self, x: Tensor, out: VQOutput) -> Tensor:
        return discriminator_loss(self.discriminator(x), self.discriminator(out.reconstruction_B3HW.detach()))

    def _adversarial_loss(self, reconstruction_B3HW: Tensor, reconstruction_loss: Tensor) -> tuple[Tensor, Tensor]:
        """The unweighted loss, and its weight."""
        config = self.config.loss.adversarial
        loss = generator_loss(self.discriminator(reconstruction_B3HW))
        last_layer = self.model.decoder.conv_out.weight
        return loss, config.weight * adaptive_weight(reconstruction_loss, loss, last_layer, config.max_adaptive_weight)

    def _count_flops(self, adversarial: bool) -> int:
        """Floating-point operations of a step on one image, with the critic's part or without."""

        def step() -> None:
            out = self.model(x)
            loss, _ = self._tokenizer_loss(x, out, adversarial)
            torch.autograd.grad(loss + out.quantizer_loss, trained)
            if adversarial:
                torch.autograd.grad(self._critic_loss(x, out), list(self.discriminator.parameters()))

        size_px = self.model.config.image_size_px
        x = torch.zeros(1, 3, size_px, size_px, device=self.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()  # the codebook stays
        flops = count_flops(step)
        self.model.train()
        return flops

    def _update(self, optimizer: Any, module: torch.nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.config.max_gradient_norm is not None:
            clip_grad_norm_(module.parameters(), self.config.max_gradient_norm)
        optimizer.step()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """After the update number `step` (from 0)."""
        # the first is a copy, and the next ones forget faster, or the random start would weigh on a short run
        decay = min(self.config.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)
        for kept, moved in zip(self.averaged.buffers(), self.model.buffers(), strict=True):  # there may be none
            kept.copy_(moved)

    def _watch_codebook(self, out: VQOutput) -> None:
        """Count, and with each row of metrics say how the codes were used since the last."""
        self.codes_trained.update(out.ids_BHW)
        self.n_restarted += out.n_restarted
        if self.global_step % self.trainer.log_every_n_steps == 0:
            seen = self.codes_trained.compute()
            values = {"usage": seen.usage, "perplexity": seen.perplexity, "restarted_codes": float(self.n_restarted)}
            self.log_dict({f"train/{name}": value for name, value in values.items()})
            self.codes_trained.reset()
            self.n_restarted = 0


def build_tokenizer(config: VQGANRunConfig) -> tuple[ImageTokenizer, dict[str, Any]]:
    """The image tokenizer that a run trains, and what its card says of where it started.

    Raises:
        CheckpointError: there is none to start from. ConfigError: it is not what the settings describe.
    """
    if config.training.start_from is None:
        return ImageTokenizer(config.model), {}
    folder = find_base(config.training.start_from, "vqgan")
    base = load_model(folder, ImageTokenizerConfig, ImageTokenizer)
    require_described(folder, base.config.model_copy(update={"ids_of": None}), config.model)
    kept = base.ids_fingerprint if config.training.trained == "decoder" else None
    tokenizer = ImageTokenizer(config.model.model_copy(update={"ids_of": kept}))
    tokenizer.load_state_dict(base.state_dict())
    return tokenizer, {"start_from": {"path": str(folder), "fingerprint": base.fingerprint}}


def train_vqgan(config: VQGANRunConfig, runs: Path, *, resume: Resume) -> Path:
    """Train as configured and return the run's folder."""
    dataset = open_dataset(config.data)
    L.seed_everything(config.trainer.seed, verbose=False)
    samples = image_samples(config.data, dataset, config.model.image_size_px, None, config.trainer.seed)
    tokenizer, started = build_tokenizer(config)
    module = VQGANModule(tokenizer, config.training, config.trainer.max_steps)
    return fit(
        module,
        StageData(*samples, config.trainer, None),
        run_config=config,
        model_config=tokenizer.config,
        card=stage_card("vqgan", dataset, config.data, **started),
        runs=runs,
        name=config.name,
        resume=resume,
        find_unused_parameters=config.training.loss.adversarial is not None,
    )
