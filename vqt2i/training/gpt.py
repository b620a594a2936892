"""Training of the GPT, from images or from a token store."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.data.images import halved
from vqt2i.data.shards import Split
from vqt2i.errors import ConfigError
from vqt2i.generation.captions import reversed_share_of
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.find import find_scorer
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import (
    GPT,
    ConditionConfig,
    LabelCondition,
    gpt_loss,
)
from vqt2i.runtime import pick_device, pick_precision
from vqt2i.text import load_tokenizer
from vqt2i.training.batches import Batch, ImageSamples
from vqt2i.training.compiled import compile_for_training
from vqt2i.training.conditions import (
    CAPTIONS,
    CaptionFeatures,
    Conditioner,
    EmbeddingCondition,
    load_encoder,
    measure_shift,
    require_labels,
    require_own_tokenizer,
    windowed,
)
from vqt2i.training.finetune import (
    AdapterConfig,
    add_adapters,
    find_base,
    freeze,
    load_base,
    merged_weights,
    plain_gpt,
    save_adapter,
)
from vqt2i.training.gpt_config import GPTRunConfig, GPTTrainingConfig, tokenizer_sizes
from vqt2i.training.launch import find_world
from vqt2i.training.optim import scheduled_optimizer
from vqt2i.training.plan import hardware_of, require_fits, setting_of, training_flops
from vqt2i.training.run import StageData, fit, open_dataset, stage_card
from vqt2i.training.samples import image_samples, token_samples
from vqt2i.training.start import Resume
from vqt2i.training.strategy import choose_deepspeed, valued_by_first_rank, wants_cpu_adam
from vqt2i.training.throughput import SampleWork
from vqt2i.vq import AnyImageTokenizer


def noised(ids_BI: Tensor, share: float, n_ids: int) -> Tensor:
    """The ids with some replaced by any of `n_ids`: of each image another share, from 0 to twice `share`.

    Data noising (Xie et al. 2017, arXiv 1703.02573) by uniform ids.
    """
    share_B1 = 2 * share * torch.rand(len(ids_BI), 1, device=ids_BI.device)
    is_wrong_BI = torch.rand(ids_BI.shape, device=ids_BI.device) < share_B1
    return torch.where(is_wrong_BI, torch.randint_like(ids_BI, n_ids), ids_BI)


class GPTModule(L.LightningModule):
    """Joins the GPT, its loss, a frozen image tokenizer and perhaps a frozen scorer. Checkpoints hold the GPT alone."""

    best_by = "val/image"  # the checkpoint with the least is kept
    exported = "gpt"  # by this name the exported model is in a checkpoint
    cpu_adam = False  # set where DeepSpeed offloads the optimizer

    def __init__(
        self,
        gpt: GPT,
        vq: AnyImageTokenizer,
        config: GPTTrainingConfig,
        max_steps: int,
        sampling: SamplingConfig,
        conditioner: Conditioner = CAPTIONS,
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        gpt.transformer.activation_checkpointing = config.activation_checkpointing
        self.gpt, self.config, self.max_steps, self.sampling = gpt, config, max_steps, sampling
        self.training_loss = compile_for_training(gpt_loss) if config.compile else gpt_loss
        self._frozen = (vq.eval().requires_grad_(False),)  # in a tuple, so that it is not registered

    @property
    def vq(self) -> AnyImageTokenizer:
        return self._frozen[0].to(self.device)

    def configure_optimizers(self) -> Any:
        return scheduled_optimizer(self.gpt, self.config.optimizer, self.max_steps, cpu_adam=self.cpu_adam)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        batch = self.prepared(batch)
        n_reversed = round(self.config.reversed_share * len(batch.chance_B))
        dropped = batch.chance_B < self.config.null_share
        dropped[:n_reversed] = False  # a caption to be predicted stays
        condition = self.gpt.reader.dropped(self.conditioner.of_images(batch, training=True), dropped)
        ids = read = self.image_ids(batch)
        if self.config.noise_share:
            drawn = noised(ids[n_reversed:], self.config.noise_share, self.gpt.layout.config.n_image_ids)
            read = torch.cat((ids[:n_reversed], drawn))
        loss = self.training_loss(self.gpt, condition, ids, n_reversed, self.config.loss, read)
        # told from the counts, for asking the values which are NaN would make the host wait for the GPU
        forth = ["image", "text"] if self.gpt.layout.predicts_prompts else ["image"]
        names = ["total"] + forth * (n_reversed < len(dropped))
        names += ["text_from_image", "image_unconditional"] * (n_reversed > 0)
        parts = {f"train/{name}": getattr(loss, name).detach() for name in names}
        # as a tensor, for Lightning would copy a float to the GPU and wait for it
        self.log_dict(parts | {"train/lr": torch.tensor(self.optimizers().param_groups[0]["lr"])})
        return loss.total

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        if not self.gpt.layout.has_both_orders:
            return self._validate_images(batch)
        ids, n = self.image_ids(batch), len(batch.chance_B)
        forth = gpt_loss(self.gpt, batch.text, ids, 0, self.config.loss)
        back = gpt_loss(self.gpt, batch.text, ids, n, self.config.loss)
        values = {
            "val/image": forth.image,
            "val/text_from_image": back.text_from_image,
            "val/image_unconditional": back.image_unconditional,
        } | ({"val/text": forth.text} if self.gpt.layout.predicts_prompts else {})
        self.log_dict(values, sync_dist=True, batch_size=n)

    def _validate_images(self, batch: Batch) -> None:
        """The image's loss after what it is trained to be read after, and after other things."""
        batch = self.prepared(batch)
        conditions, ids = self.conditioner.compared(batch, self.gpt), self.image_ids(batch)
        values = {name: gpt_loss(self.gpt, c, ids, 0, self.config.loss).image for name, c in conditions.items()}
        self.log_dict(values, sync_dist=True, batch_size=len(ids))

    def sample_work(self) -> SampleWork:
        return SampleWork("samples", self.gpt.layout.length, training_flops(self.gpt.config))

    def prepared(self, batch: Batch) -> Batch:
        """The batch as the GPT is trained on it: for super-resolution, a window of each image."""
        if not self.gpt.layout.is_upscaling:
            return batch
        if batch.image_ids is None:
            with torch.no_grad():
                image_ids, low_ids = (self.vq.encode(image) for image in (batch.image, halved(batch.image)))
            batch = batch._replace(image=None, image_ids=image_ids, low_ids=low_ids)
        layout = self.gpt.layout.config
        return windowed(batch, layout.grid_height, layout.grid_width, self.vq.config.ids_per_cell)

    def image_ids(self, batch: Batch) -> Tensor:
        """Codes (B, I): those of the store, or of the batch's images."""
        if batch.image_ids is not None:
            return batch.image_ids.flatten(1)
        with torch.no_grad():
            return self.vq.encode(batch.image).flatten(1)

    def export_model(self) -> GPT:
        """The GPT; adapters are added to its weights."""
        if self.config.lora is None:
            return self.gpt
        return plain_gpt(self.gpt.config, merged_weights(self.gpt.state_dict(), self.config.lora))

    def export_beside(self, run: Path, card: dict[str, Any]) -> None:
        """With LoRA, `RUN/adapter/`: the adapters alone."""
        if self.config.lora is not None:
            config = AdapterConfig(base=card["start_from"]["fingerprint"], lora=self.config.lora)
            save_adapter(run / "adapter", self.gpt.state_dict(), config, card)

    def sample_images(self, batch: Batch, max_images: int = 8) -> Tensor:
        """(3, 2H, n * W): validation images as the tokenizer sees them, over samples of their conditions.

        For super-resolution (3, 3H, n * W): half their resolution, enlarged, stands above.
        """
        batch = self.prepared(batch)
        ids = self.image_ids(batch)[:max_images].unflatten(1, (self.gpt.layout.config.grid_height, -1))
        conditions = self.gpt.reader.values(self.conditioner.of_images(batch, training=False))[:max_images]
        jobs = [Job(condition, i, 0) for i, condition in enumerate(conditions)]
        was_training = self.gpt.training
        self.gpt.eval()
        drawn = decode_image_ids(self.gpt, jobs, self.sampling, seed=0).to(ids.device)
        self.gpt.train(was_training)
        rows = [self.vq.decode(ids), self.vq.decode(drawn)]
        if batch.low_ids is not None:
            rows.insert(0, F.interpolate(self.vq.decode(batch.low_ids[:max_images]), scale_factor=2))
        return rearrange(rows, "row b c h w -> c (row h) (b w)")


def example_prompts(condition: ConditionConfig, split: Split, n: int = 4) -> list[str]:
    """What `generate` draws without a prompt: the first classes, or else captions of the first samples of a split, a
    language each in turn."""
    if isinstance(condition, LabelCondition):
        return list(condition.names[:n])
    prompts = []
    for index in range(min(n, len(split))):
        captions = list(split.captions(index).values())
        if captions:
            prompts.append(captions[index % len(captions)][0])
    return prompts


def train_gpt(
    config: GPTRunConfig, vq_folder: Path, vq: AnyImageTokenizer, runs: Path, *, resume: Resume, deepspeed: bool | Path
) -> Path:
    """Train as configured; returns the run's folder. `deepspeed`: a user's own JSON, or true for the generated one."""
    dataset = open_dataset(config.data)
    tokenizer = load_tokenizer(config.text_tokenizer)
    if config.bpe_dropout and not tokenizer.is_bpe:
        raise ConfigError(f"bpe_dropout {config.bpe_dropout}: {config.text_tokenizer} is a unigram model, which merges "
                          "nothing; train one by tools/train_tokenizer.py --model-type bpe")  # fmt: skip
    scorer = encoder = None
    if isinstance(config.condition, CaptionFeatures):
        encoder = load_encoder(config.condition, tokenizer)
    if isinstance(config.condition, EmbeddingCondition):
        scorer_folder, scorer = find_scorer(config.condition.scorer, runs)
        require_own_tokenizer(scorer, tokenizer, scorer_folder)
    labels = require_labels(dataset) if config.condition.kind == "label" else ()
    sizes = tokenizer_sizes(tokenizer, vq)
    gpt_config = config.model(sizes, tokenizer.fingerprint, vq.ids_fingerprint, scorer, encoder, labels)
    base, started = None, {}
    if config.training.start_from is not None:
        base = find_base(config.training.start_from)
        started = {"start_from": {"path": str(base), "fingerprint": read_card(base)["fingerprint"]}}
        if not config.upscales:
            before = reversed_share_of(read_card(base)) or 0
            started["reversed_share"] = max(config.training.reversed_share, before)
    world, device = find_world(config.trainer.devices), pick_device()
    micro_batch_size = config.trainer.micro_batch_size(world.size)
    ds_json = choose_deepspeed(deepspeed, config.deepspeed, config.training.optimizer, micro_batch_size)
    if not (config.training.frozen or config.training.lora):  # which need less, and how much less is not planned
        require_fits(
            gpt_config,
            setting_of(ds_json, activation_checkpointing=config.training.activation_checkpointing),
            hardware_of(device, world.size, world.n_nodes),
            batch_per_gpu=micro_batch_size,
            precision=pick_precision(config.trainer.precision, device.type),
        )
    L.seed_everything(config.trainer.seed, verbose=False)
    seed = config.trainer.seed
    if config.source == "store":
        samples = token_samples(
            config.data, dataset, vq, tokenizer, seed, bpe_dropout=config.bpe_dropout, labels=labels, scorer=scorer,
            low_resolution=config.upscales, n_workers=config.trainer.n_workers,
        )  # fmt: skip
    else:
        samples = image_samples(
            config.data, dataset, vq.config.image_size_px * (1 + config.upscales), tokenizer, seed,
            bpe_dropout=config.bpe_dropout, labels=labels, windowed=config.upscales,
        )  # fmt: skip
    with valued_by_first_rank(ds_json):
        if base is None:
            gpt = GPT(gpt_config)
            gpt.start_from_codes(vq.codes())
        else:
            gpt = load_base(base, gpt_config, adapted=config.training.lora is not None)
        freeze(gpt, config.training.frozen)
        if config.training.lora:
            add_adapters(gpt, config.training.lora)
    text_length = config.text_length if config.reads_text else None
    if encoder:
        text_length = config.condition.n_vectors - 1  # and the mark of the end
    if scorer:
        text_length = scorer.config.text_length if dataset.languages else None
        if config.condition.n_shift_pairs:
            pairs = ImageSamples(dataset.split(config.data.train_split), vq.config.image_size_px, tokenizer, seed)
            gpt.reader.text_shift.copy_(measure_shift(scorer, pairs, config.condition.n_shift_pairs))
    conditioner = Conditioner(config.condition, scorer, encoder)
    module = GPTModule(gpt, vq, config.training, config.trainer.max_steps, config.sampling, conditioner)
    module.cpu_adam = wants_cpu_adam(ds_json)
    return fit(
        module,
        StageData(*samples, config.trainer, text_length),
        run_config=config,
        model_config=gpt_config,
        card=stage_card(
            "upscaler" if config.upscales else "gpt",
            dataset,
            config.data,
            text_tokenizer={"path": str(config.text_tokenizer), "fingerprint": tokenizer.fingerprint},
            image_tokenizer={"path": str(vq_folder), "fingerprint": vq.fingerprint},
            **({"scorer": {"path": str(scorer_folder), "fingerprint": scorer.fingerprint}} if scorer else {}),
            **(
                {"text_encoder": {"path": str(config.condition.encoder), "fingerprint": encoder.fingerprint}}
                if encoder
                else {}
            ),
            **started,
            sampling=config.sampling.model_dump(),
            example_prompts=example_prompts(gpt_config.condition, dataset.split(config.data.validation_split)),
        ),
        runs=runs,
        name=config.name,
        resume=resume,
        deepspeed=ds_json,
    )
