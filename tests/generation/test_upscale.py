"""Pictures of twice the size: windows that cover them, what one is drawn from, and equal pictures on every path."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqt2i.data.images import to_tensor, to_uint8
from vqt2i.errors import DataError, PromptError
from vqt2i.generation import Sample, SamplingConfig, TextToImage
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.upscale import Small, plan_windows, upscale_ids
from vqt2i.gpt import GPT, LowResolution, LowResolutionCondition
from vqt2i.runtime import stream_seed

GREEDY, GUIDED = SamplingConfig(guidance=1.0, top_k=1), SamplingConfig(guidance=2.0)
# rows, columns, window, unit
GRIDS = [
    (16, 16, 8, 8, (2, 2)), (10, 14, 8, 8, (2, 2)), (8, 8, 8, 8, (2, 2)), (8, 6, 4, 4, (2, 2)), (4, 4, 2, 2, (2, 2)),
    (16, 24, 8, 12, (2, 6)), (12, 12, 6, 6, (2, 2)),
]  # fmt: skip


@pytest.fixture
def gpt(make_gpt) -> GPT:
    """Of windows of 4 x 4 ids of 6."""
    return make_gpt(condition=LowResolutionCondition(), grid_height=4, grid_width=4)


def small(height: int, width: int, index: int = 0, **more: object) -> Small:
    rng = np.random.default_rng((height, width, index))
    return Small(torch.from_numpy(rng.integers(0, 6, (height, width))), ((1, 2), (), (3,))[index % 3], index, 0, **more)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_draw_each_id_once_and_see_beyond_it_where_one_can(grid: tuple) -> None:
    rows, columns, height, width, (down, across) = grid
    windows = plan_windows(*grid)
    times, seen, best = (np.zeros((rows, columns), int) for _ in range(3))
    for window in windows:
        assert window.top % down == 0 and window.left % across == 0
        at = slice(window.top, window.top + height), slice(window.left, window.left + width)
        inner = np.zeros((rows, columns), bool)
        inner[at] = True
        if window.top > 0:
            inner[window.top : window.top + down] = False
        if window.top + height < rows:
            inner[window.top + height - down : window.top + height] = False
        if window.left > 0:
            inner[:, window.left : window.left + across] = False
        if window.left + width < columns:
            inner[:, window.left + width - across : window.left + width] = False
        times[at] += window.kept_YX
        seen[at] += window.kept_YX & inner[at]
        best |= inner
    assert (times == 1).all() and np.array_equal(seen, best)


def test_windows_overlap_by_half_as_cogviews_do() -> None:
    places = [(window.top, window.left) for window in plan_windows(64, 64, 32, 32, (2, 2))]
    assert places == [(top, left) for top in (0, 16, 32) for left in (0, 16, 32)]


def test_a_picture_of_one_window_is_drawn_plainly(gpt: GPT) -> None:
    one = small(2, 2)
    job = Job(LowResolution(one.text, tuple(one.ids_HW.flatten().tolist())), 0, 0)
    expected = decode_image_ids(gpt, [job], GUIDED, stream_seed("window", 3, 0))
    assert torch.equal(upscale_ids(gpt, [one], GUIDED, 3)[0], expected[0])


@torch.no_grad()
def drawn_naively(gpt: GPT, one: Small) -> torch.Tensor:
    """The likeliest ids, window by window, by whole sequences."""
    large = torch.full((2 * one.ids_HW.shape[0], 2 * one.ids_HW.shape[1]), -1)
    for window in plan_windows(*large.shape, 4, 4, (2, 2)):
        at = slice(window.top, window.top + 4), slice(window.left, window.left + 4)
        low = one.ids_HW[at[0].start // 2 : at[0].stop // 2, at[1].start // 2 : at[1].stop // 2].flatten().tolist()
        prefix = gpt.reader(gpt.reader.collate([LowResolution(one.text, tuple(low))], gpt.device))
        ids: list[int] = []
        for fixed in large[at].flatten().tolist():
            hidden = gpt(prefix.then(gpt.layout.image_part(torch.tensor([ids], dtype=torch.long))))
            ids.append(int(gpt.image_logits(hidden[:, -1]).argmax()) if fixed < 0 else fixed)
        large[at] = torch.where(torch.from_numpy(window.kept_YX), torch.tensor(ids).reshape(4, 4), large[at])
    return large


@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_a_window_goes_on_what_is_drawn_around_it(gpt: GPT, shape: tuple[int, int]) -> None:
    one = small(*shape)
    expected = drawn_naively(gpt, one)
    assert expected.shape == (2 * shape[0], 2 * shape[1])
    for sampling in (GREEDY, GREEDY.model_copy(update={"jacobi_window": 3})):
        assert torch.equal(upscale_ids(gpt, [one], sampling, 0)[0], expected)


def test_a_picture_depends_on_nothing_drawn_beside_it(gpt: GPT) -> None:
    pictures = [small(4, 4, 0), small(2, 3, 1), small(4, 4, 2, negative=(4,)), small(4, 4, 3)]
    expected = upscale_ids(gpt, pictures, GUIDED, 5)
    turned = upscale_ids(gpt, pictures[::-1], GUIDED, 5, rows_at_once=2)[::-1]
    alone = [upscale_ids(gpt, [picture], GUIDED, 5)[0] for picture in pictures]
    native = upscale_ids(NativeGPT(gpt, "fp32"), pictures, GUIDED, 5)
    for found in (turned, alone, native):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    other = upscale_ids(gpt, pictures, GUIDED, 6)
    assert not any(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_progress_adds_up_to_the_number_of_pictures(gpt: GPT) -> None:
    shares: list[float] = []
    upscale_ids(gpt, [small(4, 4, 0), small(2, 3, 1)], GREEDY, 0, on_progress=shares.append)
    assert sum(shares) == pytest.approx(2)


@pytest.fixture
def pipeline(upscaler_folder: Path) -> TextToImage:
    return TextToImage.load(upscaler_folder, "cpu")


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_is_drawn_from_its_ids_and_prompt(pipeline: TextToImage) -> None:
    image, prompts = picture(0), ["a red square", "a red square"]
    drawn = pipeline.upscale([image, Image.fromarray(picture(1, 8, 24))], prompts, n=2, seed=3)
    assert [(s.prompt_index, s.image_index) for s in drawn] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [s.image_HW3.shape for s in drawn] == [(32, 32, 3)] * 2 + [(16, 48, 3)] * 2
    assert not np.array_equal(drawn[0].image_ids_HW, drawn[1].image_ids_HW)
    for sample in drawn:
        ids = torch.from_numpy(sample.image_ids_HW)[None]
        assert np.array_equal(sample.image_HW3, to_uint8(pipeline.vq.decode(ids))[0])
    ids_HW = pipeline.vq.encode(to_tensor(image)[None])[0].numpy()
    given = Sample("a red square", 0, 1, 9, image, ids_HW, scores={"clip": 1.0})
    again = pipeline.upscale([given], seed=3)[0]  # the other candidate, from its ids
    assert np.array_equal(again.image_HW3, drawn[1].image_HW3)
    assert (again.scores, again.prompt, again.seed) == ({"clip": 1.0}, "a red square", 3)


def test_prompts_are_one_for_all_or_one_for_each_and_may_be_empty(pipeline: TextToImage) -> None:
    images = [picture(0), picture(1)]
    one, each = (pipeline.upscale(images, p) for p in ("a red square", ["a red square"] * 2))
    none, empty = (pipeline.upscale(images, p) for p in (None, ["", ""]))
    for a, b in ((one, each), (none, empty)):
        assert all(np.array_equal(x.image_ids_HW, y.image_ids_HW) for x, y in zip(a, b, strict=True))
    with pytest.raises(PromptError, match="3 prompts for 2 pictures: expected one for all or for each"):
        pipeline.upscale(images, ["a"] * 3)


def test_a_negative_prompt_leads_away_where_guidance_acts(pipeline: TextToImage) -> None:
    with pytest.raises(PromptError, match="acts on no token"):
        pipeline.upscale([picture(0)], negative="a green square")
    plain, led = (pipeline.upscale([picture(0)], sampling=GUIDED, negative=n)[0] for n in (None, "a green square"))
    assert not np.array_equal(plain.image_ids_HW, led.image_ids_HW)


@pytest.mark.parametrize(("height", "width"), [(18, 16), (4, 16), (16, 4)])
def test_pictures_of_sides_that_cannot_be_are_refused(pipeline: TextToImage, height: int, width: int) -> None:
    told = rf"{width} x {height} pixels: expected sides that 4 divides, and 8 x 8 or more"
    with pytest.raises(DataError, match=told):
        pipeline.upscale([picture(0, height, width)])
    if height % 4 == 0:
        sample = Sample("", 0, 0, 0, picture(0), np.zeros((height // 4, width // 4), int))
        with pytest.raises(DataError, match=told):
            pipeline.upscale([sample])


def test_a_model_of_one_kind_does_not_do_the_others_work(pipeline: TextToImage, model_folders: Path) -> None:
    with pytest.raises(PromptError, match="this GPT reads a text and cannot upscale"):
        TextToImage.load(model_folders, "cpu").upscale([picture(0)])
    with pytest.raises(PromptError, match="draws pictures from ones of half their size"):
        pipeline.generate("a red square")
    with pytest.raises(PromptError, match="draws pictures from ones of half their size"):
        pipeline.generate("a red square", negative="x", rerank=2)
