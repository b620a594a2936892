"""Training on images alone: what stands before them is their embedding, noise and null, and no caption is read."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from tokenizers import Tokenizer, models, pre_tokenizers
from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.cli import main
from vqt2i.clip import CLIP, CLIPConfig, embed_images, embed_texts
from vqt2i.clip.model import ClassReadout, EndReadout
from vqt2i.config import load_config
from vqt2i.data.images import fit_variant, to_tensor
from vqt2i.data.pairs import Pair
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import CheckpointError, ConfigError, PromptError
from vqt2i.generation.find import open_pipeline, write_pipeline
from vqt2i.generation.parts import PipelineConfig
from vqt2i.generation.pipeline import TextToImage
from vqt2i.generation.prompts import Picture
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig, LabelCondition, LossWeights, VectorCondition, gpt_loss
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.text import pad_texts
from vqt2i.text.huggingface import HuggingFaceTokenizer
from vqt2i.training.batches import Batch
from vqt2i.training.conditions import Conditioner, EmbeddingCondition, as_vectors
from vqt2i.training.encode import encode_dataset
from vqt2i.training.export import export_checkpoint
from vqt2i.training.gpt import GPTModule
from vqt2i.training.gpt_config import GPTRunConfig, GPTTrainingConfig

NO_TEXT = ("text_length=32", "training.reversed_share=0")


@pytest.fixture
def embedding(model_folders: Path) -> list[str]:
    """Overrides that train on embeddings by the tiny scorer."""
    return ["condition.kind=embedding", f"condition.scorer={model_folders / 'clip'}", *NO_TEXT]


@pytest.fixture
def uncaptioned(tiny_dataset: DataSet, tmp_path: Path) -> DataSet:
    splits = {
        name: [Pair(pair.key, pair.image_HW3, {}) for pair in tiny_dataset.split(name)] for name in ("train", "val")
    }
    return write_dataset(tmp_path / "uncaptioned", splits)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["val/image"]]


@pytest.fixture
def module(tiny_clip: CLIP, tiny_vq, make_gpt, monkeypatch: pytest.MonkeyPatch) -> GPTModule:
    """Of a GPT that reads the tiny scorer's embeddings; what it logs is in `told`."""
    condition = VectorCondition(width=16, encoder=tiny_clip.fingerprint)
    gpt = make_gpt(condition=condition, n_image_ids=16, grid_height=4, grid_width=4)
    conditioner = Conditioner(EmbeddingCondition(noise=0.5), tiny_clip)
    config = GPTTrainingConfig(reversed_share=0, null_share=0.6)
    module = GPTModule(gpt, tiny_vq, config, 9, SamplingConfig(), conditioner)
    module.told = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **options: module.told.update(values))
    monkeypatch.setattr(module, "optimizers", lambda: torch.optim.SGD(gpt.parameters(), lr=0.25))
    return module


@pytest.fixture
def batch() -> Batch:
    image = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(image, None, None, torch.linspace(0, 0.99, 8))


def test_a_step_reads_noisy_embeddings_and_the_null_for_its_share(module: GPTModule, batch: Batch, tiny_clip) -> None:
    torch.manual_seed(1)
    found = module.training_step(batch, 0)
    torch.manual_seed(1)
    clean_BE = tiny_clip.encode_image(batch.image)
    noise_BE = normalize(torch.randn_like(clean_BE), dim=-1)
    read = as_vectors(normalize(clean_BE + 0.5 * noise_BE, dim=-1))._replace(null_B=batch.chance_B < 0.6)
    expected = gpt_loss(module.gpt, read, module.image_ids(batch), 0, LossWeights())
    torch.testing.assert_close(found, expected.total)
    assert set(module.told) == {"train/total", "train/image", "train/lr"}


@torch.no_grad()
def test_validation_reads_them_clean_and_the_null_and_moved_texts(
    module: GPTModule, batch: Batch, tiny_clip, tiny_text
) -> None:
    texts = [tiny_text.encode("a red square")] * 8
    module.gpt.reader.text_shift.copy_(torch.linspace(-0.1, 0.1, 16))
    module.validation_step(batch._replace(text=pad_texts(texts, 12)), 0)
    ids, image = module.image_ids(batch), as_vectors(tiny_clip.encode_image(batch.image))
    moved = as_vectors(normalize(embed_texts(tiny_clip, texts) + module.gpt.reader.text_shift, dim=-1))
    null = image._replace(null_B=torch.ones(8, dtype=torch.bool))
    losses = [gpt_loss(module.gpt, c, ids, 0, LossWeights()).image for c in (image, null, moved)]
    assert list(module.told) == ["val/image", "val/image_unconditional", "val/image_from_text"]
    torch.testing.assert_close(list(module.told.values()), losses)
    module.told.clear()
    module.validation_step(batch, 0)
    assert list(module.told) == ["val/image", "val/image_unconditional"]


def test_scorer_and_image_tokenizer_are_frozen_and_not_in_the_checkpoint(module: GPTModule, batch: Batch) -> None:
    module.training_step(batch, 0).backward()
    assert all(name.startswith("gpt.") for name in module.state_dict())
    assert not any(p.requires_grad for p in module.conditioner.scorer.parameters())
    assert torch.equal(module.sample_images(batch, 3), module.sample_images(batch, 3))
    assert module.sample_images(batch, 3).shape == (3, 2 * 16, 3 * 16)


def test_a_store_holds_the_embedding_of_every_variant(tiny_dataset, tiny_vq, tiny_text, tiny_clip, tmp_path) -> None:
    store = encode_dataset(
        tiny_dataset, tiny_vq, tiny_text, ("val",), tmp_path / "store", scorer=tiny_clip, variants="five-crop"
    )
    assert store.spec.scorer == tiny_clip.fingerprint and store.spec.embedding_width == 16
    for index in (0, 6):
        image = tiny_dataset.split("val")[index].image_HW3
        pixels = torch.stack([to_tensor(fit_variant(image, 16, "five-crop", variant)) for variant in range(5)])
        found = store.split("val").embeddings(np.full(5, index), np.arange(5))
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), embed_images(tiny_clip, pixels))


def test_reading_images_or_their_store_trains_equal_weights(train, weights, embedding, tmp_path: Path) -> None:
    noisy = [*embedding, "condition.noise=0.3"]
    runs = [train("gpt", *noisy, f"source={source}", runs=tmp_path / source) for source in ("store", "images")]
    a, b = map(weights, runs)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_images_without_captions_are_enough(train, embedding, uncaptioned: DataSet) -> None:
    folder = train("gpt", *embedding, f"data.path={uncaptioned.folder}", "condition.noise=0.2")
    assert "val/image_from_text" not in rows_of(folder)[0]
    assert load_model(folder / "model", GPTConfig, GPT).reader.text_shift.eq(0).all()


def test_a_shift_without_captions_is_refused(train, embedding, uncaptioned: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"n_shift_pairs 8: 0 of these training pairs have a caption"):
        train("gpt", *embedding, f"data.path={uncaptioned.folder}", "condition.n_shift_pairs=8")


@pytest.fixture(scope="module")
def _once() -> dict[str, Path]:
    return {}


@pytest.fixture
def trained(train: Callable[..., Path], embedding: list[str], _once: dict[str, Path]) -> Path:
    """A run on embeddings until it knows the training images, once for all tests of this file."""
    if "run" not in _once:
        steps = ["trainer.max_steps=120", "trainer.validate_every_steps=60", "trainer.batch_size=24"]
        seen = ["data.validation_split=train", "trainer.n_validation_samples=24", "condition.n_shift_pairs=24"]
        _once["run"] = train("gpt", *embedding, *steps, *seen)
    return _once["run"]


@torch.no_grad()
def test_training_learns_images_from_their_embeddings(
    trained: Path, tiny_dataset: DataSet, tiny_vq, tiny_clip: CLIP
) -> None:
    rows = rows_of(trained)
    assert float(rows[-1]["val/image"]) < 1.5 < 2.77  # guessing costs ln 16
    assert float(rows[-1]["val/image"]) < float(rows[-1]["val/image_unconditional"]) - 0.1
    gpt = load_model(trained / "model", GPTConfig, GPT)
    image = to_tensor(np.stack([pair.image_HW3 for pair in tiny_dataset.split("train")]))
    ids, embedding_BE = tiny_vq.encode(image).flatten(1), tiny_clip.encode_image(image)
    own, others = (
        gpt_loss(gpt, as_vectors(e_BE), ids, 0, LossWeights()).image for e_BE in (embedding_BE, embedding_BE.roll(1, 0))
    )
    assert own < others - 0.2


@torch.no_grad()
def test_the_run_opens_as_a_pipeline_that_draws_from_texts_and_from_pictures(
    trained: Path, tiny_dataset: DataSet, tiny_clip: CLIP, tmp_path: Path
) -> None:
    card = read_card(trained / "model")
    pipeline = open_pipeline(str(trained), tmp_path, "cpu")
    assert pipeline.clip.fingerprint == card["scorer"]["fingerprint"] == pipeline.gpt.config.condition.encoder
    picture = Picture(tiny_dataset.split("train")[3].image_HW3, "three")
    first, again = (pipeline.generate(["a red square", picture], n=2, rerank=3) for _ in range(2))
    assert [sample.prompt for sample in first] == ["a red square"] * 2 + ["three"] * 2
    assert all(np.array_equal(a.image_HW3, b.image_HW3) for a, b in zip(first, again, strict=True))
    assert set(first[0].scores) == {"clip"}
    # the score is the cosine with the text or the picture that was asked for
    drawn = to_tensor(np.stack([sample.image_HW3 for sample in first]))
    asked = torch.cat((embed_texts(tiny_clip, [pipeline.text.encode("a red square")]),
                       tiny_clip.encode_image(to_tensor(picture.image_HW3)[None])))  # fmt: skip
    cosine = (embed_images(tiny_clip, drawn) * asked.repeat_interleave(2, 0)).sum(-1)
    torch.testing.assert_close(torch.tensor([s.scores["clip"] for s in first]), cosine, atol=0.02, rtol=0)


def test_texts_are_moved_by_the_shift_and_pictures_are_not(
    trained: Path, tiny_dataset: DataSet, tmp_path: Path
) -> None:
    pipeline = open_pipeline(str(trained), tmp_path, "cpu")
    assert pipeline.gpt.reader.text_shift.norm() > 0
    picture = Picture(tiny_dataset.split("train")[3].image_HW3, "three")
    reader = pipeline._reader
    text, image = (np.frombuffer(reader.condition(p).values, np.float32) for p in ("a red square", picture))
    moved = normalize(reader.embed("a red square") + pipeline.gpt.reader.text_shift, dim=-1)
    torch.testing.assert_close(torch.from_numpy(text.copy()), moved)
    assert np.array_equal(image, reader.embed(picture).numpy())


def test_a_shared_pipeline_keeps_the_scorer_as_it_is(trained: Path, tmp_path: Path, model_folders: Path) -> None:
    pipeline = open_pipeline(str(trained), tmp_path, "cpu")
    folders = {"text": model_folders / "text", "vq": model_folders / "vq", "gpt": trained / "model"}
    write_pipeline(folders | {"clip": model_folders / "clip"}, PipelineConfig(), tmp_path / "p", "bf16")
    shared = TextToImage.load(tmp_path / "p", "cpu")
    assert shared.clip.fingerprint == pipeline.clip.fingerprint
    assert torch.allclose(shared.gpt.reader.text_shift, pipeline.gpt.reader.text_shift, rtol=0.01)


def test_a_pipeline_of_another_scorer_or_of_none_is_refused(
    trained: Path, tmp_path: Path, model_folders: Path, tiny_clip: CLIP
) -> None:
    folders = {"text": model_folders / "text", "vq": model_folders / "vq", "gpt": trained / "model", "clip": None}
    with pytest.raises(CheckpointError, match=r"reads embeddings of the scorer .*, found none"):
        TextToImage.from_parts(folders, PipelineConfig(), "cpu")
    with torch.no_grad():
        tiny_clip.no_text.add_(1)
    save_model(tmp_path / "clip", tiny_clip, tiny_clip.config, {"kind": "clip"})
    with pytest.raises(CheckpointError, match="made with scorer"):
        TextToImage.from_parts(folders | {"clip": tmp_path / "clip"}, PipelineConfig(), "cpu")


def test_any_checkpoint_of_such_a_run_is_exported_whole(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained, None, tmp_path / "out")
    found, expected = (load_model(folder, GPTConfig, GPT) for folder in (tmp_path / "out", trained / "model"))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())


def test_a_model_of_images_alone_trains_and_draws_from_the_empty_prompt(train, tmp_path: Path) -> None:
    folder = train("gpt", "condition.kind=none", *NO_TEXT)
    assert set(rows_of(folder)[0]) >= {"val/image"} and "val/image_from_text" not in rows_of(folder)[0]
    pipeline = open_pipeline(str(folder), tmp_path, "cpu")
    assert pipeline.gpt.config.condition == LabelCondition()
    a, b = pipeline.generate("", n=2)
    assert not np.array_equal(a.image_ids_HW, b.image_ids_HW)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["training.reversed_share=0.1"], r"condition embedding has no texts to read: found training\.reversed_share"),
        (["text_length=12"], r"found text_length 12"),
        (["padding=learned"], r"found padding learned"),
        (["condition.width=7"], r"condition\.width: 7, but the scorer's embeddings are 16 wide"),
    ],
)
def test_settings_that_make_no_sense_are_refused(train, embedding, more: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train("gpt", *embedding, *more)


def test_a_text_tokenizer_that_is_not_the_scorers_is_refused(train, embedding) -> None:
    with pytest.raises(CheckpointError, match="set text_tokenizer to the one that the scorer was trained with"):
        train("gpt", *embedding, "text_tokenizer=tokenizers/bilingual.model")


def test_a_scorer_with_a_tokenizer_of_its_own_serves_too(train, tmp_path: Path) -> None:
    words = ["a", "red", "green", "blue", "yellow", "square", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    content = tokenizer.to_str().encode()
    tower = TransformerConfig(width=32, n_layers=1, n_heads=2, norm="layer", mlp="gelu_quick", bias=True, qk_norm=False)
    config = CLIPConfig(
        image_size_px=8, patch_size_px=4, text_length=5, n_text_ids=len(words), vision=tower, text=tower,
        embedding_width=12, text_tokenizer=HuggingFaceTokenizer(content, "t").fingerprint,
        image_readout=ClassReadout(), text_readout=EndReadout(start_id=6, end_id=7), pixel_mean=(0.4, 0.5, 0.6),
    )  # fmt: skip
    folder = tmp_path / "clip"
    save_model(folder, CLIP(config), config, {"kind": "clip"})
    (folder / "tokenizer.json").write_bytes(content)
    scorer = ["condition.kind=embedding", f"condition.scorer={folder}", f"text_tokenizer={folder}"]
    run = train("gpt", *scorer, *NO_TEXT, "condition.n_shift_pairs=8")
    pipeline = open_pipeline(str(run), tmp_path, "cpu")
    assert pipeline.text.encode("a red square") == pipeline.clip_text.encode("a red square") == [0, 1, 5]
    assert pipeline.gpt.config.condition.width == 12 and pipeline.gpt.reader.text_shift.norm() > 0
    (best,) = pipeline.generate("a red square a red square", rerank=2)
    assert set(best.scores) == {"clip"} and best.n_truncated == 1


def test_a_model_is_planned_by_the_width_of_a_scorer_yet_to_be_trained() -> None:
    sizes = "sizes={n_text_ids: 9, n_image_ids: 8, grid_height: 2, grid_width: 2}"
    config = load_config(GPTRunConfig, None, [sizes, "condition={kind: embedding, width: 512}", *NO_TEXT])
    assert config.model(config.sizes, "t", "i").condition.width == 512
    config = load_config(GPTRunConfig, None, [sizes, "condition={kind: embedding}", *NO_TEXT])
    with pytest.raises(ConfigError, match=r"condition\.width: null"):
        config.model(config.sizes, "t", "i")


def test_the_tool_draws_variations_of_a_picture_and_goes_on_with_the_same_only(
    trained: Path, tiny_dataset: DataSet, in_empty_folder: Path, fails, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, index in (("a.png", 3), ("b.png", 4)):
        Image.fromarray(tiny_dataset.split("train")[index].image_HW3).save(name)
    command = ["generate", "--model", str(trained), "--out", "o", "--n", "2", "--image"]
    assert main([*command, "a.png"]) == 0
    assert "2 pictures in o" in capsys.readouterr().out
    record = json.loads(Path("o/scores.jsonl").read_text())
    assert record["prompt"].startswith("a.png (") and len(list(Path("o").glob("000-*.png"))) == 2
    Path("b.png").rename("a.png")  # another picture of the same name
    assert "other prompts" in fails(*command, "a.png")


def test_pictures_that_cannot_be_read_or_drawn_from_are_told(model_folders: Path, in_empty_folder: Path, fails) -> None:
    Path("no.png").write_text("no picture")
    assert "no.png: not an image" in fails("generate", "--image", "no.png")
    assert "none.png: cannot be read" in fails("generate", "--image", "none.png")
    Image.new("RGB", (8, 8)).save("a.png")
    told = fails("generate", "--image", "a.png", "--model", model_folders)
    assert "this GPT reads a text; variations need one that reads embeddings" in told


def test_no_caption_scores_where_no_text_is_read(trained: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(str(trained), tmp_path, "cpu")
    with pytest.raises(PromptError, match="this GPT predicts no text from an image; use the scorer 'clip'"):
        pipeline.generate("a red square", rerank=2, scorer="both")
