"""The settings of a training of the GPT, and the GPT that they describe."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from vqt2i.clip import CLIP
from vqt2i.config import Config
from vqt2i.errors import ConfigError
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import (
    GPTConfig,
    HeadConfig,
    LayoutConfig,
    LossWeights,
    Positions,
    TextCondition,
)
from vqt2i.nn.sparsity import DenseConfig, SparsityConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import TextTokenizer
from vqt2i.text.encoder import TextEncoder
from vqt2i.training.conditions import (
    TrainedCondition,
    model_condition,
)
from vqt2i.training.finetune import (
    LoRAConfig,
    Part,
)
from vqt2i.training.optim import OptimizerConfig
from vqt2i.training.run import DataConfig, TrainerConfig
from vqt2i.training.strategy import DeepSpeedConfig
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
