"""Super-resolution: windows of stored or encoded ids, and training that learns from half the resolution."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.cli import main
from vqt2i.config import load_config
from vqt2i.data.images import halved, to_tensor
from vqt2i.data.pairs import Pair
from vqt2i.data.sampling import Visits
from vqt2i.data.shards import DataSet, write_dataset
from vqt2i.errors import CheckpointError, ConfigError, DataError
from vqt2i.evaluation.upscaling import measure_upscaling, require_large
from vqt2i.generation import SamplingConfig
from vqt2i.generation.find import find_parts, open_pipeline, open_upscaler, write_pipeline
from vqt2i.generation.parts import PipelineConfig
from vqt2i.gpt import GPT, GPTConfig, LowResolutionBatch, LowResolutionCondition
from vqt2i.training.batches import Batch, ImageSamples, TokenSamples
from vqt2i.training.conditions import Conditioner, windowed
from vqt2i.training.encode import encode_dataset
from vqt2i.training.export import export_checkpoint
from vqt2i.training.finetune import load_base
from vqt2i.training.gpt import GPTModule
from vqt2i.training.gpt_config import GPTRunConfig, GPTTrainingConfig
from vqt2i.training.record import read_record
from vqt2i.vq import ImageTokenizer

SIZE_PX = 32  # of the pictures; the image tokenizer's is 16, its cells are of 4
ALL = Visits(*(part.reshape(-1) for part in np.mgrid[0:24, 0:3]))  # 24 samples in 3 epochs


@pytest.fixture(scope="session")
def large_dataset(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: DataSet) -> DataSet:
    """The coloured squares with sharp edges at other places, in twice the size."""
    splits = {}
    for name, n in (("train", 24), ("val", 7)):
        pairs = []
        for index, pair in enumerate(tiny_dataset.split(name)):
            rng = np.random.default_rng((n, index))
            image = np.full((SIZE_PX, SIZE_PX, 3), 128, np.uint8)
            y, x = rng.integers(0, SIZE_PX - 14, 2)
            image[y : y + 14, x : x + 14] = rng.integers(0, 2, 3) * 200
            pairs.append(Pair(pair.key, image, pair.captions))
        splits[name] = pairs
    return write_dataset(tmp_path_factory.mktemp("data") / "large", splits)


@pytest.fixture
def upscaling(large_dataset: DataSet) -> list[str]:
    """Overrides that train on windows of the large pictures."""
    return ["condition.kind=low_resolution", "training.reversed_share=0", f"data.path={large_dataset.folder}"]


@pytest.fixture
def module(tiny_vq: ImageTokenizer, make_gpt) -> GPTModule:
    gpt = make_gpt(condition=LowResolutionCondition(), grid_height=4, grid_width=4, n_image_ids=16, n_text_ids=400,
                   text_length=12)  # fmt: skip
    config, conditioner = GPTTrainingConfig(reversed_share=0), Conditioner(gpt.config.condition)
    return GPTModule(gpt, tiny_vq, config, 9, SamplingConfig(guidance=1.0), conditioner)


def validated(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/image"]]
    return [{name: float(value) for name, value in row.items() if name.startswith("val/")} for row in rows]


def test_windows_are_cut_at_the_same_place_of_both_resolutions_and_everywhere_in_time() -> None:
    low = torch.arange(5 * 8).reshape(1, 5, 8)  # 5 rows of 4 cells with 2 ids each
    high = torch.arange(10 * 16).reshape(1, 10, 16)
    places = set()
    for u in torch.rand(300, 1, 2, generator=torch.Generator().manual_seed(0)):
        found = windowed(Batch(None, high, None, u[0, :1], low_ids=low, place_B2=u), 4, 8, ids_per_cell=2)
        top, left = divmod(int(found.low_ids[0, 0, 0]), 8)
        assert left % 2 == 0 and torch.equal(found.low_ids[0], low[0, top : top + 2, left : left + 4])
        assert torch.equal(found.image_ids[0], high[0, 2 * top : 2 * top + 4, 2 * left : 2 * left + 8])
        places.add((top, left))
    assert places == {(top, left) for top in range(4) for left in (0, 2, 4)}
    almost_1 = torch.full((1, 2), 1 - 2**-24)
    last = windowed(Batch(None, high, None, u[0, :1], low_ids=low, place_B2=almost_1), 4, 8, ids_per_cell=2)
    assert int(last.low_ids[0, -1, -1]) == 39


@pytest.mark.parametrize("variants", ["centre", "five-crop"])
def test_the_store_gives_the_windows_that_the_images_give(
    variants: str, large_dataset: DataSet, module: GPTModule, tiny_vq, tiny_text, tmp_path: Path
) -> None:
    store = encode_dataset(
        large_dataset, tiny_vq, tiny_text, ("train",), tmp_path / "store", low_resolution=True, variants=variants
    )
    images = ImageSamples(large_dataset.split("train"), SIZE_PX, tiny_text, 3, variants, windowed=True)
    tokens = TokenSamples(store.split("train"), 3)
    assert store.spec.low_resolution and store.spec.image_shape[1:] == (8, 8)
    for augment in (True, False):
        from_images, from_store = (module.prepared(s.batch(ALL, 12, augment=augment)) for s in (images, tokens))
        assert torch.equal(from_images.image_ids, from_store.image_ids)
        assert torch.equal(from_images.low_ids, from_store.low_ids)
        assert torch.equal(from_images.text.ids_BS, from_store.text.ids_BS)
        assert from_store.image_ids.shape == (72, 4, 4) and from_store.low_ids.shape == (72, 2, 2)
    places_B2 = tokens.batch(ALL, 12, augment=True).place_B2
    assert len(places_B2.unique(dim=0)) == 72  # another one at each visit
    again = tokens.batch(Visits(*(part[5:9] for part in ALL)), 12, augment=True).place_B2
    assert torch.equal(again, places_B2[5:9])


def test_stored_ids_are_those_of_the_picture_and_of_its_half(
    large_dataset: DataSet, tiny_vq, tiny_text, tmp_path: Path
) -> None:
    store = encode_dataset(large_dataset, tiny_vq, tiny_text, ("val",), tmp_path / "store", low_resolution=True)
    part = store.split("val").part(0, 7)
    image = to_tensor(np.stack([pair.image_HW3 for pair in large_dataset.split("val")]))
    assert np.array_equal(part.image_ids_NVHW[:, 0], tiny_vq.encode(image).numpy())
    assert np.array_equal(part.low_ids_NVHW[:, 0], tiny_vq.encode(halved(image)).numpy())
    means = image.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
    torch.testing.assert_close(halved(image), means)
    again = encode_dataset(large_dataset, tiny_vq, tiny_text, ("val", "train"), tmp_path / "store", low_resolution=True)
    assert np.array_equal(again.split("val").part(0, 7).low_ids_NVHW, part.low_ids_NVHW)  # copied, not encoded
    with pytest.raises(DataError, match="encoded with low_resolution True, expected False"):
        encode_dataset(large_dataset, tiny_vq, tiny_text, ("val",), tmp_path / "store")


def test_it_learns_to_draw_the_picture_that_it_is_given(train, upscaling: list[str], tmp_path: Path) -> None:
    steps = "trainer={max_steps: 150, batch_size: 24, validate_every_steps: 75, n_validation_samples: 24, "
    folder = train("gpt", *upscaling, "data.validation_split=train", f"{steps}precision: fp32}}")
    first, last = validated(folder)
    assert set(last) == {"val/image", "val/image_without_text", "val/image_from_another"}
    assert last["val/image"] < first["val/image"] < 2.77  # guessing costs ln 16
    assert last["val/image"] < last["val/image_from_another"] - 0.3
    assert (folder / "samples" / "step-00000150.png").is_file()
    card = read_card(folder / "model")
    assert card["kind"] == "upscaler" and card["metrics"]["val/image"] == pytest.approx(last["val/image"], abs=1e-5)
    pipeline = open_upscaler(None, tmp_path / "runs", "cpu")
    pairs = require_large(pipeline, DataSet.open(Path(card["data"]["path"])).split("train"), 99)
    rows = measure_upscaling(pipeline, pairs, SamplingConfig(guidance=1.0, top_k=1), 0)
    assert {row.n for row in rows} == {24}
    assert {row.name for row in rows} == {"psnr", "ssim", "sharpness", "same_ids", "right"}
    found = {(row.where["way"], row.name): row.value for row in rows}
    assert {way for way, _ in found} == {"bicubic", "bicubic, decoded", "ids repeated", "drawn", "real ids"}
    assert found["real ids", "same_ids"] == 1 and ("bicubic", "same_ids") not in found
    assert found["drawn", "same_ids"] > found["ids repeated", "same_ids"]


def test_the_sampled_picture_shows_what_was_given_what_it_is_and_what_is_drawn(
    module: GPTModule, large_dataset: DataSet, tiny_text
) -> None:
    batch = ImageSamples(large_dataset.split("val"), SIZE_PX, tiny_text, 0, windowed=True).batch(
        Visits(np.arange(3), np.zeros(3, int)), 12, augment=False
    )
    assert module.sample_images(batch, 2).shape == (3, 3 * 16, 2 * 16)


def test_interrupted_and_resumed_it_ends_with_the_same_weights(train, weights, upscaling) -> None:
    folder = train("gpt", *upscaling)
    whole = weights(folder)
    assert train("gpt", *upscaling, resume=folder / "checkpoints" / "step-00000005.ckpt") == folder
    assert [start.step for start in read_record(folder).starts] == [0, 5]
    assert all(torch.equal(value, whole[name]) for name, value in weights(folder).items())


def test_any_checkpoint_is_exported_and_a_pipeline_shared(train, upscaling, tmp_path: Path) -> None:
    run = train("gpt", *upscaling)
    export_checkpoint(run, None, tmp_path / "out")
    exported, model = (load_model(folder, GPTConfig, GPT) for folder in (tmp_path / "out", run / "model"))
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in model.state_dict().items())
    folders, config = find_parts(str(run), tmp_path, ("gpt", "upscaler"))
    write_pipeline(folders, config, tmp_path / "shared", "fp32")
    shared = open_upscaler(str(tmp_path / "shared"), tmp_path, "cpu")
    assert shared.gpt.config.condition == LowResolutionCondition() and isinstance(config, PipelineConfig)


def test_the_newest_run_for_prompts_is_not_that_for_super_resolution(train, upscaling, tmp_path: Path) -> None:
    of_texts = train("gpt", "name=texts", "trainer.max_steps=1", "training.reversed_share=0")
    upscaler = train("gpt", *upscaling, "trainer.max_steps=1")
    runs = tmp_path / "runs"
    assert open_pipeline(None, runs, "cpu").gpt_folder == of_texts / "model"
    assert open_upscaler(None, runs, "cpu").gpt_folder == upscaler / "model"
    with pytest.raises(CheckpointError, match="a model of kind 'upscaler'; expected a pipeline folder or a GPT run"):
        open_pipeline(str(upscaler), runs, "cpu")
    with pytest.raises(CheckpointError, match="kind 'gpt'; expected a pipeline folder or a run for super-resolution"):
        open_upscaler(str(of_texts), runs, "cpu")
    with pytest.raises(CheckpointError, match="no run for super-resolution in it, and none is shipped"):
        open_upscaler(None, tmp_path, "cpu")


def test_with_paired_marks_it_starts_from_a_gpt_of_texts_and_has_three_ids_more(make_gpt, tmp_path: Path) -> None:
    base = make_gpt("sequence", grid_height=4, grid_width=4, image_marks="paired", padding="learned")
    save_model(tmp_path / "base", base, base.config, {"kind": "gpt"})
    started = load_base(tmp_path / "base", base.config.model_copy(update={"condition": LowResolutionCondition()}))
    own, longer = base.state_dict(), {}
    for name, value in started.state_dict().items():
        n = min(len(value), len(own[name]))
        longer[name] = len(value) - len(own[name])
        assert torch.equal(value[:n], own[name][:n])
    assert {name: n for name, n in longer.items() if n} == {
        "embedding.weight": 3, "position_embeddings.0.weight": 20 - 25,  # of the second image, from its marks on
    }  # fmt: skip


@pytest.mark.parametrize("positions", ["rotary", "learned", "raster", "sequence"])
def test_it_starts_from_a_gpt_of_texts_with_its_weights(positions: str, make_gpt, tmp_path: Path) -> None:
    base = make_gpt(positions, grid_height=4, grid_width=4)
    save_model(tmp_path / "base", base, base.config, {"kind": "gpt"})
    config = base.config.model_copy(update={"condition": LowResolutionCondition()})
    started = load_base(tmp_path / "base", config)
    assert started.config == config and started.training
    for name, value in base.state_dict().items():
        assert torch.equal(started.state_dict()[name][: len(value)], value)
        longer = len(started.state_dict()[name]) - len(value)
        first = {"sequence": 4, "learned": 1, "raster": 1}.get(positions, 0)  # low resolution, or its plane
        assert longer == (first if name == "position_embeddings.0.weight" else 0)
    with pytest.raises(ConfigError, match=r"training\.lora: adapters belong to a GPT that reads what they do"):
        load_base(tmp_path / "base", config, adapted=True)
    with pytest.raises(ConfigError, match=r"condition\.kind: low_resolution there, text here"):
        save_model(tmp_path / "upscaler", started, config, {"kind": "upscaler"})
        load_base(tmp_path / "upscaler", base.config)


def test_a_run_starts_from_a_trained_gpt_of_texts(train, upscaling, model_folders: Path) -> None:
    start = f"training.start_from={model_folders}"
    folder = train("gpt", *upscaling, start, "trainer={max_steps: 1, batch_size: 8, precision: fp32}")
    card = read_card(folder / "model")
    assert card["start_from"]["path"] == str(model_folders / "gpt") and "reversed_share" not in card
    with pytest.raises(ConfigError, match=r"training\.lora"):
        train("gpt", *upscaling, start, "training.lora={rank: 2}")


def test_a_stage_reads_the_codes_of_its_own_window(module: GPTModule) -> None:
    batch = Batch(
        None, torch.zeros(2, 4, 4, dtype=torch.long), None, torch.zeros(2), low_ids=torch.ones(2, 2, 2).long()
    )
    found = module.conditioner.of_images(batch, training=True)
    assert isinstance(found, LowResolutionBatch) and found.codes_BM.tolist() == [[1] * 4] * 2


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["training.reversed_share=0.15"],
            r"found training\.reversed_share 0\.15; .*set training\.reversed_share to 0",
        ),
        (["null_condition=image_first"], r"found null_condition image_first"),
        (["data.path=PLAIN"], r"s000: 16 x 16 pixels; super-resolution learns from pictures of 32 x 32 and more"),
        (["data.path=PLAIN", "source=images"], r"s0\d\d: 16 x 16 pixels; super-resolution learns from pictures of 32"),
    ],
)
def test_what_makes_no_sense_is_refused(train, upscaling, tiny_dataset: DataSet, more: list[str], told: str) -> None:
    more = [one.replace("PLAIN", str(tiny_dataset.folder)) for one in more]
    with pytest.raises((ConfigError, DataError), match=told):
        train("gpt", *upscaling, *more)


def test_the_length_that_is_planned_holds_the_small_picture() -> None:
    sizes = "sizes={n_text_ids: 9, n_image_ids: 8, grid_height: 4, grid_width: 4}"
    more = ["condition.kind=low_resolution", "training.reversed_share=0", "text_length=5"]
    config = load_config(GPTRunConfig, None, [sizes, *more])
    model = config.model(config.sizes, "t", "i")
    assert model.sequence_layout.length == 5 + 3 + 4 + 16


def test_training_on_images_gives_the_weights_of_training_on_the_store(train, upscaling, weights) -> None:
    def trained(source: str) -> dict[str, Tensor]:
        return weights(train("gpt", *upscaling, f"source={source}", f"name={source}"))

    stored, encoded = trained("store"), trained("images")
    assert all(torch.equal(stored[name], value) for name, value in encoded.items())


def test_a_store_for_it_is_made_ahead_by_the_tool(large_dataset: DataSet, model_folders: Path, tmp_path: Path) -> None:
    command = ["encode_dataset", "--data", large_dataset.folder, "--vq", model_folders / "vq", "--low-resolution"]
    command += ["--text", model_folders / "text" / "text.model", "--out", tmp_path / "store"]
    assert main([str(part) for part in command]) == 0
    assert (tmp_path / "store" / "train.low_ids.npy").is_file()
