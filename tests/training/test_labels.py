"""Classes before images: through the store and past it, into the model's names, and back by name in drawing."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vqt2i.checkpoint import load_model, read_card
from vqt2i.cli import main
from vqt2i.config import load_config
from vqt2i.data.pairs import Pair
from vqt2i.data.sampling import Visits
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.data.store import TokenStore
from vqt2i.errors import ConfigError, DataError, PromptError
from vqt2i.generation import SamplingConfig
from vqt2i.generation.find import find_parts, open_pipeline, write_pipeline
from vqt2i.generation.reading import label_of
from vqt2i.generation.samples import Mix
from vqt2i.gpt import GPT, GPTConfig, LabelCondition, LossWeights, gpt_loss
from vqt2i.training.batches import Batch, ImageSamples, TokenSamples
from vqt2i.training.conditions import ClassCondition, Conditioner
from vqt2i.training.encode import encode_dataset
from vqt2i.training.export import export_checkpoint
from vqt2i.training.gpt_config import GPTRunConfig

BY_CLASS = ("condition.kind=label", "text_length=32", "training.reversed_share=0")
COLOURS = ("blue", "green", "red", "yellow")


@pytest.fixture
def train_labelled(train: Callable[..., Path], labelled: DataSet) -> Callable[..., Path]:
    return lambda *more, **options: train("gpt", *BY_CLASS, f"data.path={labelled.folder}", *more, **options)


def numbers_of(dataset: DataSet, split: str) -> list[int]:
    return [dataset.labels.index(pair.label) for pair in dataset.split(split)]


def test_a_store_keeps_the_number_of_every_class(labelled: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    store = encode_dataset(
        labelled, tiny_vq, tiny_text, ("train", "val"), tmp_path / "store", batch_size=3, n_workers=1
    )
    assert store.spec.labels == labelled.labels == COLOURS
    for name in ("train", "val"):
        split = store.split(name)
        assert split.labels(np.arange(len(split))).tolist() == numbers_of(labelled, name)
        assert split.part(2, 5).labels_N.tolist() == numbers_of(labelled, name)[2:5]


def test_a_grown_data_set_keeps_the_classes_of_what_was_encoded(
    labelled: DataSet, tiny_vq, tiny_text, tmp_path: Path
) -> None:
    encode_dataset(labelled, tiny_vq, tiny_text, ("val",), tmp_path / "store")
    store = encode_dataset(labelled, tiny_vq, tiny_text, ("train",), tmp_path / "store")
    for name in ("train", "val"):
        index = np.arange(len(store.split(name)))
        assert store.split(name).labels(index).tolist() == numbers_of(labelled, name)


def test_a_store_of_other_classes_is_not_added_to(labelled: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    out = encode_dataset(labelled, tiny_vq, tiny_text, ("train",), tmp_path / "store").folder
    pairs = [*labelled.split("train"), Pair("new", np.zeros((16, 16, 3), np.uint8), {}, label="black")]
    grown = write_dataset(tmp_path / "grown", {"train": pairs}, shard_size=5)
    with pytest.raises(DataError, match=r"encoded with labels \('blue', .*expected \('black', 'blue'"):
        encode_dataset(grown, tiny_vq, tiny_text, ("train",), out)


def test_a_store_made_before_there_were_classes_is_read(tiny_dataset, tiny_vq, tiny_text, tmp_path: Path) -> None:
    folder = encode_dataset(tiny_dataset, tiny_vq, tiny_text, ("val",), tmp_path / "store").folder
    spec = json.loads((folder / "store.json").read_text())
    assert spec.pop("labels") == []
    (folder / "store.json").write_text(json.dumps(spec))
    assert TokenStore.open(folder).split("val").labels(np.arange(2)) is None


def test_images_and_their_store_give_equal_classes(labelled: DataSet, tiny_vq, tiny_text, tmp_path: Path) -> None:
    store = encode_dataset(labelled, tiny_vq, tiny_text, ("train",), tmp_path / "store")
    visits = Visits(np.array([3, 0, 17]), np.zeros(3, np.int64))
    stored = TokenSamples(store.split("train"), 0).batch(visits, None, augment=True)
    read = ImageSamples(labelled.split("train"), 16, None, 0, labels=labelled.labels).batch(visits, None, augment=True)
    assert stored.label_B.tolist() == read.label_B.tolist() == [numbers_of(labelled, "train")[i] for i in (3, 0, 17)]
    assert ImageSamples(labelled.split("train"), 16, None, 0).batch(visits, None, augment=True).label_B is None


def test_reading_images_or_their_store_trains_equal_weights(train_labelled, weights, tmp_path: Path) -> None:
    a, b = (weights(train_labelled(f"source={source}", runs=tmp_path / source)) for source in ("store", "images"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_a_class_of_a_stream_that_validation_does_not_know_is_named(labelled: DataSet) -> None:
    pair = Pair("k7", np.zeros((16, 16, 3), np.uint8), {}, label="mauve")
    samples = ImageSamples([pair], 16, None, 0, labels=labelled.labels)
    with pytest.raises(DataError, match=r"sample k7: its class is 'mauve'; expected one .*blue, green, red, yellow"):
        samples.batch(Visits(np.array([0]), np.array([0])), None, augment=True)


def test_the_loss_is_of_the_image_behind_its_class(make_gpt) -> None:
    gpt = make_gpt(condition=LabelCondition(n_labels=3))
    batch = Batch(
        None, torch.randint(6, (4, 3, 2)), None, torch.linspace(0, 0.9, 4), label_B=torch.tensor([2, 0, 1, 2])
    )
    read = Conditioner(ClassCondition()).of_images(batch, training=True)
    dropped = gpt.reader.dropped(read, batch.chance_B < 0.4)
    assert dropped.tolist() == [3, 3, 1, 2]
    found = gpt_loss(gpt, dropped, batch.image_ids.flatten(1), 0, LossWeights())
    assert torch.isfinite(found.total)


# --- a trained run ---


@pytest.fixture(scope="module")
def _once() -> dict[str, Path]:
    return {}


@pytest.fixture
def trained(train_labelled, _once: dict[str, Path]) -> Path:
    """A run on classes until it knows the training images, once for all tests of this file."""
    if "run" not in _once:
        steps = ["trainer.max_steps=150", "trainer.validate_every_steps=75", "trainer.batch_size=24"]
        _once["run"] = train_labelled(*steps, "data.validation_split=train", "trainer.n_validation_samples=24")
    return _once["run"]


def test_training_learns_images_from_their_classes(trained: Path) -> None:
    with open(trained / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/image"]]
    assert float(rows[-1]["val/image"]) < 1.5 < 2.77  # guessing costs ln 16
    assert float(rows[-1]["val/image"]) < float(rows[-1]["val/image_unconditional"]) - 0.1


def test_the_model_knows_its_classes_by_name(trained: Path) -> None:
    config = load_model(trained / "model", GPTConfig, GPT).config
    assert config.condition == LabelCondition(n_labels=4, names=COLOURS) and config.text_tokenizer is None
    card = read_card(trained / "model")
    assert card["example_prompts"] == list(COLOURS)


def test_what_is_drawn_of_a_class_is_likelier_of_it_than_of_others(trained: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(str(trained), tmp_path, "cpu")
    drawn = pipeline.generate(list(COLOURS), n=4)
    ids_BI = torch.from_numpy(np.stack([sample.image_ids_HW for sample in drawn])).flatten(1)
    labels_B = torch.arange(4).repeat_interleave(4)
    with torch.no_grad():
        own, others = (
            gpt_loss(pipeline.gpt, labels, ids_BI, 0, LossWeights()).image for labels in (labels_B, (labels_B + 1) % 4)
        )
    assert own < others - 0.3


def test_guidance_negative_and_mixed_classes_are_read_by_name(trained: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(str(trained), tmp_path, "cpu")
    reader, guided = pipeline._reader, SamplingConfig(guidance=3.0)
    assert [reader.condition(prompt) for prompt in ("red", "blue", "")] == [COLOURS.index("red"), 0, 4]
    plain = pipeline.generate("red", sampling=guided)[0].image_ids_HW
    for more in ({"negative": "blue"}, {"mix": Mix("blue", 0.5)}):
        assert not np.array_equal(pipeline.generate("red", sampling=guided, **more)[0].image_ids_HW, plain)
        with pytest.raises(PromptError, match="prompt 'purple': no class"):
            wrong = {"negative": "purple"} if "negative" in more else {"mix": Mix("purple", 0.5)}
            pipeline.generate("red", sampling=guided, **wrong)


def test_the_tool_draws_by_name_and_examples_without_one(
    trained: Path, in_empty_folder: Path, fails, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "red", "--model", str(trained), "--n", "2", "--out", "o"]) == 0
    assert main(["generate", "--model", str(trained), "--n", "1", "--out", "e"]) == 0
    found = [json.loads(line)["prompt"] for line in Path("e/scores.jsonl").read_text().splitlines()]
    assert found == list(COLOURS)
    told = fails("generate", "a red square", "--model", trained)
    assert "prompt 'a red square': no class of this GPT; it reads one of 4: blue, green, red, yellow" in told
    assert "this GPT predicts no text from an image; use the scorer 'clip'" in fails(
        "generate", "red", "--model", trained, "--rerank", 2, "--scorer", "caption"
    )


def test_a_diagnosis_is_refused_in_words(trained: Path, tiny_dataset: DataSet, fails, in_empty_folder: Path) -> None:
    told = fails("diagnose", trained, tiny_dataset.folder, "--out", "d")
    assert "this GPT reads a label; expected one that reads texts" in told
    assert not Path("d").exists()


def test_a_shared_pipeline_and_any_checkpoint_keep_the_names(trained: Path, tmp_path: Path) -> None:
    write_pipeline(*find_parts(str(trained), tmp_path), tmp_path / "p", "fp32")
    pipeline = open_pipeline(str(tmp_path / "p"), tmp_path, "cpu")
    assert pipeline.gpt.config.condition.names == COLOURS and pipeline.config.example_prompts == COLOURS
    export_checkpoint(trained, 75, tmp_path / "out")
    assert load_model(tmp_path / "out", GPTConfig, GPT).config.condition.names == COLOURS


# --- what makes no sense ---


def test_a_data_set_without_classes_is_refused(train, tiny_dataset: DataSet) -> None:
    with pytest.raises(DataError, match="its samples have no classes, which condition label reads"):
        train("gpt", *BY_CLASS)


def test_another_number_of_classes_than_planned_is_refused(train_labelled) -> None:
    with pytest.raises(ConfigError, match=r"condition\.n_labels: 3, but the data set has 4 classes"):
        train_labelled("condition.n_labels=3")


def test_settings_of_texts_are_refused(train_labelled) -> None:
    with pytest.raises(ConfigError, match=r"condition label has no texts to read: found text_length 12"):
        train_labelled("text_length=12")


def test_a_model_is_planned_by_the_number_of_classes_yet_to_be_collected() -> None:
    sizes = "sizes={n_text_ids: 9, n_image_ids: 8, grid_height: 2, grid_width: 2}"
    planned = load_config(GPTRunConfig, None, [sizes, *BY_CLASS, "condition.n_labels=1000"])
    assert planned.model(planned.sizes, "t", "i").condition == LabelCondition(n_labels=1000)
    unplanned = load_config(GPTRunConfig, None, [sizes, *BY_CLASS])
    with pytest.raises(ConfigError, match=r"condition\.n_labels: null"):
        unplanned.model(unplanned.sizes, "t", "i")


def test_names_are_of_all_classes_and_differ() -> None:
    for names in (("a", "b"), ("a", "b", "b")):
        with pytest.raises(ValueError, match=r"names: found 2 different ones, expected n_labels \(3\)"):
            LabelCondition(n_labels=3, names=names)


def test_a_prompt_names_a_class_or_its_number_where_there_are_no_names() -> None:
    named, numbered, none = (
        LabelCondition(n_labels=3, names=("b", "1", "c")),
        LabelCondition(n_labels=3),
        LabelCondition(),
    )
    assert [label_of(prompt, named) for prompt in ("b", "1", "c", "")] == [0, 1, 2, 3]
    assert [label_of(prompt, numbered) for prompt in ("0", "2", "")] == [0, 2, 3]
    assert label_of("", none) == 0
    for prompt, condition, told in [
        ("2", named, "'2': no class of this GPT; it reads one of 3: b, 1, c"),
        ("3", numbered, "'3': no class of this GPT; it reads one of 3: 0, 1, 2"),
        ("a cat", none, "'a cat': expected the empty prompt, for this GPT reads nothing"),
    ]:
        with pytest.raises(PromptError, match=told):
            label_of(prompt, condition)


def test_of_many_classes_the_nearest_are_told() -> None:
    names = (*(f"n{i:04d}" for i in range(50)), "golden retriever")
    with pytest.raises(PromptError, match=r"one of 51, such as golden retriever$"):
        label_of("golden retreiver", LabelCondition(n_labels=51, names=names))
