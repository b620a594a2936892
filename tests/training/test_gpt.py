import csv
from pathlib import Path

import pytest
import torch

from vqt2i.checkpoint import load_model, read_card
from vqt2i.data.shards import DataSet
from vqt2i.errors import ConfigError
from vqt2i.generation.find import open_pipeline
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig, LabelCondition, LossWeights, TextCondition, gpt_loss
from vqt2i.text import TextBatch, pad_texts
from vqt2i.training.batches import Batch
from vqt2i.training.gpt import GPTModule, example_prompts, noised
from vqt2i.training.gpt_config import GPTTrainingConfig


@pytest.fixture
def gpt(model_folders: Path) -> GPT:
    return load_model(model_folders / "gpt", GPTConfig, GPT)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    text = pad_texts([[5 + i, 9] for i in range(8)], 12)
    return Batch(None, torch.randint(16, (8, 4, 4), generator=generator), text, torch.linspace(0, 0.99, 8))


def make_module(gpt: GPT, tiny_vq, monkeypatch, **config: float) -> GPTModule:
    module = GPTModule(gpt, tiny_vq, GPTTrainingConfig(**config), 10, SamplingConfig())
    module.told = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **options: module.told.update(values))
    optimizer = torch.optim.SGD(gpt.parameters(), lr=0.25)
    monkeypatch.setattr(module, "optimizers", lambda: optimizer)
    return module


def test_reading_images_or_their_store_trains_equal_weights(train, weights, tmp_path: Path) -> None:
    runs = [train("gpt", f"source={source}", runs=tmp_path / source) for source in ("store", "images")]
    a, b = map(weights, runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_shares_of_reversed_rows_and_dropped_texts_are_as_configured(
    gpt: GPT, tiny_vq, batch: Batch, monkeypatch
) -> None:
    module = make_module(gpt, tiny_vq, monkeypatch, reversed_share=0.25, null_share=0.6)
    kept = [True, True, False, False, False, True, True, True]  # two rows reversed; of the others, chances below 0.6
    text = TextBatch(batch.text.ids_BS, batch.text.n_ids_B * torch.tensor(kept))
    expected = gpt_loss(gpt, text, batch.image_ids.flatten(1), 2, LossWeights())
    torch.testing.assert_close(module.training_step(batch, 0), expected.total)
    assert module.told["train/text_from_image"] == expected.text_from_image and module.told["train/lr"] == 0.25
    assert batch.text.n_ids_B.tolist() == [2] * 8


def test_ids_are_read_wrongly_and_predicted_rightly_and_where_a_caption_is_predicted_read_rightly(
    gpt: GPT, tiny_vq, batch: Batch, monkeypatch
) -> None:
    module = make_module(gpt, tiny_vq, monkeypatch, reversed_share=0.25, null_share=0, noise_share=0.3)
    ids = batch.image_ids.flatten(1)
    torch.manual_seed(0)
    found = module.training_step(batch, 0)
    torch.manual_seed(0)
    read = torch.cat((ids[:2], noised(ids[2:], 0.3, 16)))
    expected = gpt_loss(gpt, batch.text, ids, 2, LossWeights(), read)
    plain = gpt_loss(gpt, batch.text, ids, 2, LossWeights())
    torch.testing.assert_close(found, expected.total)
    assert expected.text_from_image == plain.text_from_image and expected.text == plain.text
    assert expected.image != plain.image
    module.validation_step(batch, 0)
    assert module.told["val/image"] == gpt_loss(gpt, batch.text, ids, 0, LossWeights()).image


@pytest.mark.parametrize("by_class", [False, True])
def test_what_is_read_moves_the_predictions_and_not_what_is_to_be_predicted(
    by_class: bool, gpt: GPT, batch: Batch, make_gpt
) -> None:
    ids, condition = batch.image_ids.flatten(1), batch.text
    if by_class:
        gpt = make_gpt(condition=LabelCondition(n_labels=2))
        condition, ids = torch.zeros(8, dtype=torch.long), ids[:, :6] % 6
    plain = gpt_loss(gpt, condition, ids, 0, LossWeights()).image
    last, first = ids.clone(), ids.clone()
    last[:, -1], first[:, 0] = (ids[:, -1] + 1) % 6, (ids[:, 0] + 1) % 6
    assert gpt_loss(gpt, condition, ids, 0, LossWeights(), last).image == plain  # nothing is predicted from the last
    assert gpt_loss(gpt, condition, ids, 0, LossWeights(), first).image != plain


def test_of_each_image_another_share_of_ids_is_wrong() -> None:
    torch.manual_seed(0)
    ids = torch.zeros(400, 500, dtype=torch.long)
    wrong_B = (noised(ids, 0.2, 1000) != 0).float().mean(1)
    assert wrong_B.mean().item() == pytest.approx(0.2, abs=0.015) and wrong_B.max() < 0.47
    assert wrong_B.min() < 0.03 and wrong_B.max() > 0.35
    assert torch.equal(noised(ids, 0.0, 1000), ids)


def test_without_reversed_rows_their_losses_are_not_logged(gpt: GPT, tiny_vq, batch: Batch, monkeypatch) -> None:
    module = make_module(gpt, tiny_vq, monkeypatch, reversed_share=0.0)
    module.training_step(batch, 0)
    assert {"train/image", "train/text", "train/total"} <= set(module.told)
    assert not {"train/text_from_image", "train/image_unconditional"} & set(module.told)


def test_validation_measures_both_modalities_in_both_orders_without_dropping(
    gpt: GPT, tiny_vq, batch: Batch, monkeypatch
) -> None:
    module = make_module(gpt, tiny_vq, monkeypatch, null_share=0.9)
    module.validation_step(batch, 0)
    ids = batch.image_ids.flatten(1)
    forth, back = (gpt_loss(gpt, batch.text, ids, n, LossWeights()) for n in (0, 8))
    assert module.told == {
        "val/image": forth.image, "val/text": forth.text, "val/text_from_image": back.text_from_image,
        "val/image_unconditional": back.image_unconditional,
    }  # fmt: skip


def test_the_image_tokenizer_is_frozen_and_not_in_the_checkpoint(gpt: GPT, tiny_vq, batch: Batch, monkeypatch) -> None:
    module = make_module(gpt, tiny_vq, monkeypatch)
    module.training_step(batch, 0).backward()
    assert all(name.startswith("gpt.") for name in module.state_dict())
    assert not any(p.requires_grad for p in tiny_vq.parameters()) and not tiny_vq.training
    assert set(map(id, module.parameters())) == set(map(id, gpt.parameters()))


def test_the_sample_picture_holds_images_over_drawings_of_their_captions(
    gpt: GPT, tiny_vq, batch: Batch, monkeypatch
) -> None:
    module = make_module(gpt.train(), tiny_vq, monkeypatch)
    picture = module.sample_images(batch, max_images=3)
    assert picture.shape == (3, 2 * 16, 3 * 16) and gpt.training
    torch.testing.assert_close(picture[:, :16, 16:32], tiny_vq.decode(batch.image_ids[1:2])[0])
    assert torch.equal(module.sample_images(batch, max_images=3), picture)


def test_training_learns_the_images_of_the_captions(train) -> None:
    steps = ["trainer.max_steps=120", "trainer.validate_every_steps=60", "trainer.batch_size=24"]
    # on images that were seen, for the codes of an untrained tokenizer are noise
    seen = ["data.validation_split=train", "trainer.n_validation_samples=24"]
    folder = train("gpt", *steps, *seen, "training.reversed_share=0.25")
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/image"]]
    assert len(rows) == 2
    losses = {name: float(rows[-1][name]) for name in rows[0] if name.startswith("val/")}
    assert losses["val/image"] < 0.5 < 2.77 and losses["val/text"] < 1 < 5.7  # guessing costs ln 16 and ln 300
    # a caption says the colour, so an image is likelier with it than without; and the reverse
    assert losses["val/image"] < losses["val/image_unconditional"] - 0.3
    assert losses["val/text_from_image"] < losses["val/text"] - 0.1
    assert (folder / "samples" / "step-00000120.png").is_file()


def test_a_trained_run_opens_as_a_pipeline_with_its_own_prompts_and_sampling(
    train, tiny_dataset: DataSet, tmp_path: Path, model_folders: Path
) -> None:
    train("clip", "trainer.max_steps=1")
    folder = train("gpt", "trainer.max_steps=1", "sampling.guidance=3.5")
    card = read_card(folder / "model")
    assert card["image_tokenizer"]["path"] == str(model_folders / "vq")
    pipeline = open_pipeline(None, tmp_path / "runs", "cpu")
    assert pipeline.gpt.fingerprint == card["fingerprint"] and pipeline.clip is not None
    assert pipeline.config.sampling.guidance == 3.5
    assert pipeline.config.example_prompts == tuple(example_prompts(TextCondition(), tiny_dataset.split("val")))
    assert len(pipeline.generate(["a red square"], n=2, rerank=3)) == 2


def test_bare_texts_and_a_head_with_a_norm_train_go_on_and_are_drawn_from(train, weights, tmp_path: Path) -> None:
    kind = ("padding=bare", "head={norm: true, bias: true}", "positions=learned", "training.reversed_share=0")
    folder = train("gpt", "name=bare", "trainer.max_steps=2", *kind)
    more = train("gpt", "name=more", "trainer.max_steps=1", f"training.start_from={folder}", *kind)
    before, after = weights(folder), weights(more)
    assert before.keys() == after.keys() >= {"head.norm.weight", "head.bias"}
    assert not torch.equal(before["head.bias"], after["head.bias"])
    drawn = open_pipeline(str(folder), tmp_path / "runs", "cpu").generate(["a red square"], n=2)
    assert len(drawn) == 2
    with pytest.raises(ConfigError, match="padding bare has no order image → text"):
        train("gpt", *kind, "training.reversed_share=0.1")


def test_example_prompts_take_the_languages_in_turn(tiny_dataset: DataSet) -> None:
    prompts, split = example_prompts(TextCondition(), tiny_dataset.split("val"), 3), tiny_dataset.split("val")
    assert prompts == [split.captions(0)["en"][0], split.captions(1)["zh"][0], split.captions(2)["en"][0]]


def test_bpe_dropout_of_a_unigram_model_is_refused(train) -> None:
    with pytest.raises(ConfigError, match=r"bpe_dropout 0\.1: .*text\.model is a unigram model.*--model-type bpe"):
        train("gpt", "bpe_dropout=0.1")
