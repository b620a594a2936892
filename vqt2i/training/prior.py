"""Training of a prior: captioned pairs, embedded by a frozen scorer."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from pydantic import PositiveInt
from torch import Tensor

from vqt2i.clip import CLIP, Prior, PriorConfig, embed_images, modality_gap
from vqt2i.config import Config
from vqt2i.errors import ConfigError
from vqt2i.generation.find import find_scorer
from vqt2i.text import load_tokenizer
from vqt2i.training.batches import Batch
from vqt2i.training.conditions import require_own_tokenizer
from vqt2i.training.optim import AdamWConfig, OptimizerConfig, scheduled_optimizer
from vqt2i.training.run import DataConfig, StageData, TrainerConfig, fit, open_dataset, stage_card
from vqt2i.training.samples import image_samples
from vqt2i.training.start import Resume
from vqt2i.training.throughput import SampleWork


class PriorTrainingConfig(Config):
    optimizer: AdamWConfig = OptimizerConfig(beta2=0.98, weight_decay=0.1)


class PriorRunConfig(Config):
    """`configs/prior/NAME.yaml`. text_tokenizer: the scorer's. scorer: a model folder; null is the newest trained one
    in the runs folder, else the shipped one; it must be the one that the GPT reads embeddings of.
    """

    name: str = "prior"
    data: DataConfig = DataConfig()
    text_tokenizer: Path = Path("tokenizers/bilingual.model")
    scorer: Path | None = None
    hidden_width: PositiveInt = 512
    n_layers: PositiveInt = 2
    training: PriorTrainingConfig = PriorTrainingConfig()
    trainer: TrainerConfig = TrainerConfig(batch_size=128)


class PriorModule(L.LightningModule):
    """Joins the prior, its loss and a frozen scorer. Checkpoints hold the prior alone."""

    best_by = "val/loss"  # the checkpoint with the least is kept
    exported = "prior"  # by this name the exported model is in a checkpoint

    def __init__(self, prior: Prior, scorer: CLIP, config: PriorTrainingConfig, max_steps: int) -> None:
        super().__init__()
        self.prior, self.config, self.max_steps = prior, config, max_steps
        self._frozen = (scorer.eval().requires_grad_(False),)  # in a tuple, so that it is not registered
        self._seen: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> Any:
        return scheduled_optimizer(self.prior, self.config.optimizer, self.max_steps)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        image_BE, text_BE = self._embedded(batch)
        loss = 1 - (self.prior(text_BE) * image_BE).sum(-1).mean()
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self._seen.append(self._embedded(batch))

    def on_validation_epoch_end(self) -> None:
        """Cosines with the image: of the prior, of the text itself, and of texts that are all moved by the same."""
        image_BE, text_BE = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        cosine, gap = (self.prior(text_BE) * image_BE).sum(-1).mean(), modality_gap(image_BE, text_BE)
        values = {"loss": 1 - cosine, "cosine": cosine, "text_cosine": gap.cosine, "shifted_cosine": gap.shifted_cosine}
        self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)

    def export_model(self) -> Prior:
        return self.prior

    def sample_work(self) -> SampleWork:
        return SampleWork("pairs", None, 6 * sum(p.numel() for p in self.prior.parameters()))

    @torch.no_grad()
    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings of the batch's images and captions; samples without a caption are left out."""
        scorer, captioned_B = self._frozen[0].to(self.device), batch.text.n_ids_B > 0
        return embed_images(scorer, batch.image[captioned_B]), scorer.encode_text(*(t[captioned_B] for t in batch.text))


def train_prior(config: PriorRunConfig, runs: Path, *, resume: Resume) -> Path:
    """Train as configured; returns the run's folder.

    Raises:
        ConfigError: a data set without captions. CheckpointError: a text tokenizer that is not the scorer's.
    """
    dataset = open_dataset(config.data)
    if not dataset.languages:
        raise ConfigError(f"{dataset.folder}: has no captions; a prior is trained on captioned pairs")
    tokenizer = load_tokenizer(config.text_tokenizer)
    scorer_folder, scorer = find_scorer(config.scorer, runs)
    require_own_tokenizer(scorer, tokenizer, scorer_folder)
    prior_config = PriorConfig(
        width=scorer.config.embedding_width, hidden_width=config.hidden_width, n_layers=config.n_layers,
        scorer=scorer.fingerprint,
    )  # fmt: skip
    L.seed_everything(config.trainer.seed, verbose=False)
    samples = image_samples(config.data, dataset, scorer.config.image_size_px, tokenizer, config.trainer.seed)
    module = PriorModule(Prior(prior_config), scorer, config.training, config.trainer.max_steps)
    return fit(
        module,
        StageData(*samples, config.trainer, scorer.config.text_length),
        run_config=config,
        model_config=prior_config,
        card=stage_card(
            "prior",
            dataset,
            config.data,
            text_tokenizer={"path": str(config.text_tokenizer), "fingerprint": tokenizer.fingerprint},
            scorer={"path": str(scorer_folder), "fingerprint": scorer.fingerprint},
        ),
        runs=runs,
        name=config.name,
        resume=resume,
    )
