"""Training of the GPT, from images or from a token store."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from vqt2i.checkpoint import read_card
from vqt2i.clip import CLIP
from vqt2i.config import Config
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
    GPTConfig,
    HeadConfig,
    LabelCondition,
    LayoutConfig,
    LossWeights,
    Positions,
    TextCondition,
    gpt_loss,
)
from vqt2i.nn.sparsity import DenseConfig, SparsityConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.runtime import pick_device, pick_precision
from vqt2i.text import TextTokenizer, load_tokenizer
from vqt2i.text.encoder import TextEncoder
from vqt2i.training.batches import Batch, ImageSamples
from vqt2i.training.compiled import compile_for_training
from vqt2i.training.conditions import (
    CAPTIONS,
    CaptionFeatures,
    Conditioner,
    EmbeddingCondition,
    TrainedCondition,
    load_encoder,
    measure_shift,
    model_condition,
    require_labels,
    require_own_tokenizer,
    windowed,
)
from vqt2i.training.finetune import (
    AdapterConfig,
    LoRAConfig,
    Part,
    add_adapters,
    find_base,
    freeze,
    load_base,
    merged_weights,
    plain_gpt,
    save_adapter,
)
from vqt2i.training.launch import find_world
from vqt2i.training.optim import OptimizerConfig, scheduled_optimizer
from vqt2i.training.plan import hardware_of, require_fits, setting_of, training_flops
from vqt2i.training.run import DataConfig, StageData, TrainerConfig, fit, open_dataset, stage_card
from vqt2i.training.samples import image_samples, token_samples
from vqt2i.training.start import Resume
from vqt2i.training.strategy import DeepSpeedConfig, choose_deepspeed, valued_by_first_rank, wants_cpu_adam
from vqt2i.training.throughput import SampleWork
from vqt2i.vq import AnyImageTokenizer


class GPTTrainingConfig(Config):
    """reversed_share: of a batch, read image → text. null_share: of the others, text dropped (for guidance).

    noise_share: of the ids of an image, those that are read wrongly while it is drawn (see `noised`), so that what it
        shows is taken from the text rather than from the ids before. docs/scaling.md tells what for.

    start_from: a GPT to go on training from, instead of random weights: its model folder, its run or its pipeline.
        frozen: parts of it that stay as they are. lora: to train adapters of it alone (see `LoRAConfig`).
    activation_checkpointing: blocks compute their activations again instead of keeping them: a third more time for a
        fraction of the memory. compile: the step with torch.compile.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossWeights = LossWeights()
    reversed_share: float = Field(0.15, ge=0, le=1)
    null_share: float = Field(0.1, ge=0, lt=1)
    noise_share: float = Field(0.0, ge=0, le=0.5)
    start_from: Path | None = None
    frozen: tuple[Part, ...] = ()
    lora: LoRAConfig | None = None
    activation_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _what_stays_has_been_trained(self) -> "GPTTrainingConfig":
        if (self.frozen or self.lora) and self.start_from is None:
            raise ValueError("frozen and lora are for a trained GPT; give its folder as start_from")
        if self.frozen and self.lora:
            raise ValueError("lora trains the adapters alone, so frozen has no meaning; leave one of them out")
        return self


class TokenizerSizes(Config):
    """What a GPT's size depends on in its tokenizers: how many ids each has, and the grid of an image."""

    n_text_ids: PositiveInt
    n_image_ids: PositiveInt
    grid_height: PositiveInt
    grid_width: PositiveInt


class GPTRunConfig(Config):
    """`configs/gpt/NAME.yaml`.

    text_tokenizer: a SentencePiece model. image_tokenizer: a model folder; null is the newest trained one in the runs
        folder that is no palette, else the shipped one. sizes: what the tokenizers must have, for tokenizers that are
        yet to be trained (tools/plan.py needs no more of them); null is whatever they have. source: "store" encodes the
        images once, "images" at every step. padding, null_condition, image_marks, text_attention: as in `LayoutConfig`.
        bpe_dropout: probability that a merge of the text tokenizer, a BPE model, is left out when a caption is read for
        training (DALL·E: 0.1, arXiv 2102.12092, §2.2).
    condition: what is read before an image. Without texts in it nothing else is said of texts: `text_tokenizer` is the
        scorer's, and `text_length`, `padding`, `null_condition`, `image_marks`, `text_attention`, `bpe_dropout` stay as
        they are.
    """

    name: str = "gpt"
    data: DataConfig = DataConfig()
    text_tokenizer: Path = Path("tokenizers/bilingual.model")
    image_tokenizer: Path | None = None
    sizes: TokenizerSizes | None = None
    source: Literal["store", "images"] = "store"
    text_length: PositiveInt = 32
    padding: Literal["masked", "learned", "bare"] = "masked"
    null_condition: Literal["empty_text", "image_first"] = "empty_text"
    image_marks: Literal["single", "paired"] = "single"
    text_attention: Literal["causal", "full"] = "causal"
    bpe_dropout: float = Field(0.0, ge=0, lt=1)
    transformer: TransformerConfig = TransformerConfig()
    positions: Positions = "rotary"
    sparsity: SparsityConfig = DenseConfig()
    head: HeadConfig = HeadConfig()
    condition: TrainedCondition = TextCondition()
    training: GPTTrainingConfig = GPTTrainingConfig()
    trainer: TrainerConfig = TrainerConfig()
    sampling: SamplingConfig = SamplingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def reads_text(self) -> bool:
        """Whether texts are read by their ids."""
        return self.condition.kind in ("text", "low_resolution")

    @property
    def upscales(self) -> bool:
        """Whether images are drawn from half their resolution."""
        return self.condition.kind == "low_resolution"

    @model_validator(mode="after")
    def _streams_are_images(self) -> "GPTRunConfig":
        if self.data.stream and self.source == "store":
            raise ValueError("data.stream is not kept, so it has no store: set source=images")
        return self

    @model_validator(mode="after")
    def _settings_of_texts_are_for_texts(self) -> "GPTRunConfig":
        of_texts = ("text_length", "padding", "null_condition", "image_marks", "text_attention", "bpe_dropout")
        wrong = {name: getattr(self, name) for name in of_texts}
        wrong = {name: value for name, value in wrong.items() if value != type(self).model_fields[name].default}
        wrong |= {"training.reversed_share": share} if (share := self.training.reversed_share) else {}
        if self.upscales:
            wrong = {name: wrong[name] for name in ("null_condition", "training.reversed_share") if name in wrong}
        told = ", ".join(f"{name} {value}" for name, value in wrong.items())
        if wrong and self.upscales:
            raise ValueError(f"condition low_resolution reads no image before its text: found {told}; set "
                             "training.reversed_share to 0, and leave null_condition out")  # fmt: skip
        if wrong and self.condition.kind != "text":
            raise ValueError(f"condition {self.condition.kind} has no texts to read: found {told}; leave them out, and "
                             "set training.reversed_share to 0")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _bare_texts_are_not_predicted_from_images(self) -> "GPTRunConfig":
        if self.padding == "bare" and self.training.reversed_share:
            raise ValueError("padding bare has no order image → text: found training.reversed_share "
                             f"{self.training.reversed_share}, expected 0")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _texts_seen_in_full_are_not_predicted(self) -> "GPTRunConfig":
        if self.text_attention == "full" and self.training.loss.text:
            raise ValueError("text_attention full: a text that sees all of itself is not predicted: found "
                             f"training.loss.text {self.training.loss.text:g}, expected 0")  # fmt: skip
        return self

    def model(
        self,
        sizes: TokenizerSizes,
        text_tokenizer: str,
        image_tokenizer: str,
        scorer: CLIP | None = None,
        encoder: TextEncoder | None = None,
        labels: tuple[str, ...] = (),
    ) -> GPTConfig:
        """The GPT that is trained on ids of tokenizers of these sizes and fingerprints, and embeddings of this scorer,
        features of this encoder or classes of these names.

        Raises:
            ConfigError: the configuration was written for tokenizers of other sizes, for another scorer or number of
                classes.
        """
        if self.sizes not in (None, sizes):
            raise ConfigError(f"sizes: {self.sizes}, but the tokenizers have {sizes}; "
                              "train tokenizers of these sizes, or set sizes to null")  # fmt: skip
        condition, reads_text = model_condition(self.condition, scorer, encoder, labels), self.reads_text
        names = ("text_length", "padding", "null_condition", "image_marks", "text_attention")
        text = {name: getattr(self, name) for name in names}
        text["n_text_ids"] = sizes.n_text_ids
        image = sizes.model_dump(exclude={"n_text_ids"})
        return GPTConfig(
            transformer=self.transformer,
            layout=LayoutConfig(**image, **(text if reads_text else {})),
            condition=condition,
            positions=self.positions,
            sparsity=self.sparsity,
            head=self.head,
            text_tokenizer=text_tokenizer if reads_text else None,
            image_tokenizer=image_tokenizer,
        )


def tokenizer_sizes(text: TextTokenizer, image: AnyImageTokenizer) -> TokenizerSizes:
    """The sizes of trained tokenizers; images are square."""
    config = image.config
    return TokenizerSizes(
        n_text_ids=text.n_ids, n_image_ids=config.vocab_size, grid_height=config.grid_height,
        grid_width=config.grid_width,
    )  # fmt: skip


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
