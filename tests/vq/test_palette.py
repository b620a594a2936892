"""Pixels as ids of colours: exact where colours suffice, else nearest, and k-means that has come to rest."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from vqt2i.checkpoint import save_model
from vqt2i.data.images import to_tensor, to_uint8
from vqt2i.errors import CheckpointError, DataError
from vqt2i.generation.memory import finishing_needs, tracked_peak
from vqt2i.vq import ImageTokenizer, PaletteConfig, PaletteTokenizer, load_image_tokenizer
from vqt2i.vq.palette import fit_colours


def random_pixels(n: int, seed: int = 0, most: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, (n, 3), dtype=np.uint8)


@pytest.fixture
def palette() -> PaletteTokenizer:
    """Twelve colours of random pixels."""
    tokenizer = PaletteTokenizer(PaletteConfig(image_size_px=6, n_colours=12)).eval()
    tokenizer.colours_K3.copy_(fit_colours(random_pixels(400), 12, seed=0))
    return tokenizer


def mean_error(pixel_N3: np.ndarray, colours_K3: torch.Tensor) -> float:
    """Squared, of the nearest colour."""
    differences_NK3 = pixel_N3[:, None].astype(float) - colours_K3.numpy()[None]
    return float((differences_NK3**2).sum(-1).min(1).mean())


def test_where_there_are_as_many_colours_as_in_the_images_they_come_back_as_they_were() -> None:
    image_BHW3 = random_pixels(9, most=40)[np.random.default_rng(1).integers(0, 9, (2, 5, 4))]
    tokenizer = PaletteTokenizer(PaletteConfig(image_size_px=5, n_colours=9))
    tokenizer.colours_K3.copy_(fit_colours(image_BHW3.reshape(-1, 3), 9, seed=0))
    assert np.array_equal(to_uint8(tokenizer.decode(tokenizer.encode(to_tensor(image_BHW3)))), image_BHW3)


def test_a_pixel_has_the_id_of_the_nearest_colour(palette: PaletteTokenizer) -> None:
    image_B3HW = to_tensor(random_pixels(2 * 5 * 7, seed=3).reshape(2, 5, 7, 3))
    colours_K3 = to_tensor(palette.colours_K3[None])[:, 0].T
    distances = (image_B3HW.movedim(1, -1)[..., None, :] - colours_K3).square().sum(-1)
    assert torch.equal(palette.encode(image_B3HW), distances.argmin(-1))


def test_a_picture_that_was_decoded_saved_and_read_has_the_ids_it_had(palette: PaletteTokenizer) -> None:
    ids_BHW = torch.arange(2 * 3 * 6).view(2, 3, 6) % 12
    saved = to_uint8(palette.decode(ids_BHW))
    assert torch.equal(palette.encode(to_tensor(saved)), ids_BHW)
    assert torch.equal(palette.encode(palette.decode(ids_BHW)), ids_BHW)


def test_autocast_mixes_up_no_colours() -> None:
    tokenizer = PaletteTokenizer(PaletteConfig(n_colours=64))
    tokenizer.colours_K3.copy_(torch.stack((torch.arange(64) + 100, *[torch.full((64,), 99)] * 2), 1))
    ids_BHW = torch.arange(64).view(1, 8, 8)
    image_B3HW = tokenizer.decode(ids_BHW)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(image_B3HW), ids_BHW)


def test_what_was_fitted_is_at_rest() -> None:
    pixel_N3 = random_pixels(600, seed=5, most=60)
    colours_K3 = fit_colours(pixel_N3, 10, seed=0, most_rounds=200)
    assert len(colours_K3.unique(dim=0)) == 10
    differences = pixel_N3[:, None].astype(float) - colours_K3.numpy()[None]
    nearest_N = (differences**2).sum(-1).argmin(1)
    for number, colour_3 in enumerate(colours_K3.numpy()):
        own = pixel_N3[nearest_N == number]
        assert len(own) and np.array_equal(np.rint(own.mean(0)), colour_3)


def test_frequent_pixels_weigh_more() -> None:
    pixel_N3 = np.array([[0, 0, 0]] * 90 + [[10, 0, 0]] * 10 + [[200, 0, 0]], np.uint8)
    assert sorted(fit_colours(pixel_N3, 2, seed=0).tolist()) == [[1, 0, 0], [200, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_the_start_spreads_over_far_clusters(seed: int) -> None:
    centres_83 = np.array([[r, g, b] for r in (20, 230) for g in (20, 230) for b in (20, 230)])
    pixel_N3 = (centres_83[np.arange(800) % 8] + random_pixels(800, seed, most=7) - 3).astype(np.uint8)
    found = fit_colours(pixel_N3, 8, seed, most_rounds=3).long()
    assert {tuple(c) for c in (found // 128).tolist()} == {tuple(c) for c in (centres_83 // 128).tolist()}


def test_a_colour_that_no_pixel_is_nearest_to_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pixel_N3 = random_pixels(300, seed=2)
    monkeypatch.setattr("vqt2i.vq.palette._spread_start", lambda colours, *_: torch.zeros(6, 3))
    colours_K3 = fit_colours(pixel_N3, 6, seed=0)
    nearest_N = ((pixel_N3[:, None].astype(float) - colours_K3.numpy()) ** 2).sum(-1).argmin(1)
    assert len(np.unique(nearest_N)) == 6


def test_more_colours_are_nearer_and_equal_seeds_give_equal_ones() -> None:
    pixel_N3 = random_pixels(500)
    errors = [mean_error(pixel_N3, fit_colours(pixel_N3, n, seed=0)) for n in (2, 8, 32, 128)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]
    a, b = (fit_colours(pixel_N3, 16, seed=7) for _ in range(2))
    assert torch.equal(a, b)


def test_fewer_colours_than_asked_for_are_told() -> None:
    with pytest.raises(DataError, match="n_colours 5: the training pixels have 4 different colours"):
        fit_colours(np.repeat(random_pixels(4), 20, 0), 5, seed=0)


def test_images_and_ids_that_do_not_fit_are_refused(palette: PaletteTokenizer) -> None:
    with pytest.raises(DataError, match=r"expected \(batch, 3, height, width\)"):
        palette.encode(torch.zeros(3, 4, 4))
    with pytest.raises(DataError, match="expected 0 to 11, found 0 to 12"):
        palette.decode(torch.tensor([[[0, 12]]]))
    with pytest.raises(DataError, match="expected an integer tensor"):
        palette.decode(torch.zeros(1, 2, 2))
    with pytest.raises(ValidationError, match="n_colours"):
        PaletteConfig(n_colours=1)


def test_it_has_the_sizes_of_an_image_tokenizer() -> None:
    config = PaletteConfig(image_size_px=32, n_colours=512)
    assert (config.grid_height, config.grid_width, config.n_image_ids, config.vocab_size) == (32, 32, 1024, 512)
    assert (config.downsample, config.ids_per_cell) == (1, 1)


def test_a_model_folder_is_loaded_as_the_kind_it_is(
    palette: PaletteTokenizer, model_folders: Path, tmp_path: Path
) -> None:
    fingerprint = save_model(tmp_path / "p", palette, palette.config, {"kind": "palette"})
    loaded = load_image_tokenizer(tmp_path / "p")
    assert isinstance(loaded, PaletteTokenizer) and loaded.config == palette.config
    assert loaded.fingerprint == fingerprint and torch.equal(loaded.colours_K3, palette.colours_K3)
    assert loaded.colours_K3.dtype == torch.uint8
    assert isinstance(load_image_tokenizer(model_folders / "vq"), ImageTokenizer)
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_image_tokenizer(tmp_path / "none")
    (tmp_path / "p" / "config.yaml").write_text("kind: palette\nn_colours: 13\n")
    with pytest.raises(CheckpointError, match=r"colours_K3: found \(12, 3\), its config.yaml expects \(13, 3\)"):
        load_image_tokenizer(tmp_path / "p")


@pytest.mark.parametrize("n", [1, 4, 16])
def test_decoding_pictures_takes_what_was_calculated(palette: PaletteTokenizer, make_gpt, n: int) -> None:
    needs = finishing_needs(palette, make_gpt(grid_height=20, grid_width=30), None, False)
    assert 0.5 <= tracked_peak(palette.decode, torch.zeros(n, 20, 30, dtype=torch.long)) / needs.of(n) <= 1
