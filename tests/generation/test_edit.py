from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqt2i.data.images import GREY, to_tensor, to_uint8
from vqt2i.errors import ConfigError, DataError, PromptError
from vqt2i.generation import Box, Extend, KeepTop, Mask, Paste, SamplingConfig, TextToImage, Vary
from vqt2i.generation.decode import PlainDrawing, decode_image_ids
from vqt2i.generation.edit import Canvas, fix_kept, open_canvas, paste, varied_cells
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.rerank import likelihood_scores
from vqt2i.generation.rows import GuidedRows, Job
from vqt2i.gpt import GPT
from vqt2i.text import pad_texts

I = 6  # noqa: E741  ids of the 3 x 2 grid
FIXED = [
    (), (3, 1, 4, None, None, None), (None, None, 2, 5, None, 0), (0, None, 1, None, 2, None), (5, 4, 3, 2, 1, 0),
]  # fmt: skip
TEXTS = [(1, 2, 3), ()]
JOBS = [Job(text, prompt, i, fixed=fixed) for prompt, text in enumerate(TEXTS) for i, fixed in enumerate(FIXED)]
SETTINGS = [
    SamplingConfig(guidance=1.0),
    SamplingConfig(guidance=3.0),
    SamplingConfig(guidance=3.0, guidance_interval=(0.5, 0.9), top_k=4),
    SamplingConfig(guidance=3.0, jacobi_window=3),
]


@pytest.fixture
def gpt(make_gpt) -> GPT:
    return make_gpt()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_fixed_tokens_are_those_given_whatever_stands_beside_an_image(gpt: GPT, sampling: SamplingConfig) -> None:
    found = decode_image_ids(gpt, JOBS, sampling, seed=5)
    for job, ids in zip(JOBS, found.flatten(1).tolist(), strict=True):
        assert all(fixed in (None, id) for fixed, id in zip(job.fixed or [None] * I, ids, strict=True))
    assert len({tuple(ids) for ids in found.flatten(1).tolist()}) == len(JOBS) - 1  # of each text one is all fixed
    for rows in (1, 3):
        assert torch.equal(decode_image_ids(gpt, JOBS, sampling, seed=5, rows_at_once=rows), found)
    order = torch.randperm(len(JOBS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode_image_ids(gpt, [JOBS[i] for i in order], sampling, seed=5), found[order])


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_where_nothing_is_fixed_drawing_is_as_ever(gpt: GPT, sampling: SamplingConfig) -> None:
    free, nothing = ([job._replace(fixed=fixed) for job in JOBS] for fixed in ((), (None,) * I))
    n_passes: list[dict[Job, int]] = [{}, {}]
    a, b = (
        decode_image_ids(gpt, jobs, sampling, seed=5, on_passes=passes.__setitem__)
        for jobs, passes in zip((free, nothing), n_passes, strict=True)
    )
    assert torch.equal(a, b) and list(n_passes[0].values()) == list(n_passes[1].values())


@pytest.mark.parametrize("positions", ["rotary", "learned", "raster", "sequence"])
def test_a_drawn_token_is_drawn_after_all_before_it(make_gpt, positions: str) -> None:
    gpt, sampling = make_gpt(positions), SamplingConfig(guidance=1.0, top_k=1)
    found = decode_image_ids(gpt, JOBS, sampling, seed=5).flatten(1)
    with torch.no_grad():
        texts = pad_texts([list(job.condition) for job in JOBS], 5)
        hidden = gpt(gpt.layout.join(texts, found))
        likeliest = gpt.image_logits(hidden[:, gpt.layout.image_targets(reversed_order=False)]).argmax(-1)
    for job, ids, wanted in zip(JOBS, found.tolist(), likeliest.tolist(), strict=True):
        assert ids == [w if f is None else f for f, w in zip(job.fixed or [None] * I, wanted, strict=True)]
    window = decode_image_ids(gpt, JOBS, sampling.model_copy(update={"jacobi_window": 4}), seed=5)
    assert torch.equal(window.flatten(1), found)


def test_leading_fixed_tokens_are_read_in_one_step_with_the_result_of_one_by_one(gpt: GPT) -> None:
    job, sampling = JOBS[1]._replace(image_index=0), SETTINGS[1]
    sizes, n_passes = [], {}
    hook = gpt.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    found = decode_image_ids(gpt, [job], sampling, seed=5, on_passes=n_passes.__setitem__)
    hook.remove()
    # the text and the null condition, then conditional and null rows: three given tokens, two drawn ones
    assert sizes == [(1, 6), (1, 4), (2, 3), (2, 1), (2, 1)] and n_passes[job] == 4
    with torch.inference_mode():
        rows, together = (GuidedRows(gpt, [job], sampling) for _ in range(2))
        one_by_one = [rows.logits(found.flatten(1)[:, :n]) for n in range(4)][-1]
        torch.testing.assert_close(together.logits(found.flatten(1)[:, :3]), one_by_one)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_native_images_are_the_gpts(gpt: GPT, sampling: SamplingConfig) -> None:
    expected, native = decode_image_ids(gpt, JOBS, sampling, seed=5), NativeGPT(gpt, "fp32")
    for rows in (3, 64):
        assert torch.equal(decode_image_ids(native, JOBS, sampling, seed=5, rows_at_once=rows), expected)
    ids, texts = expected, [job.condition for job in JOBS]
    torch.testing.assert_close(likelihood_scores(native, ids, texts), likelihood_scores(gpt, ids, texts))


def test_the_compiled_engine_hands_images_with_fixed_tokens_to_plain_drawing(gpt: GPT) -> None:
    from vqt2i.generation.compiled import CompiledEngine

    engine = CompiledEngine(gpt, lambda step, gpt: step)
    assert isinstance(engine(JOBS, torch.rand(I, len(JOBS)).double(), SETTINGS[1]), PlainDrawing)
    assert torch.equal(
        decode_image_ids(gpt, JOBS, SETTINGS[1], seed=5, start=engine), decode_image_ids(gpt, JOBS, SETTINGS[1], seed=5)
    )


def test_a_window_over_fixed_tokens_draws_the_distribution_that_single_steps_draw(gpt: GPT) -> None:
    jobs = [Job((1, 2), 0, i, fixed=(None, 4, None, 3, 2, 5)) for i in range(400)]
    sampling = SamplingConfig(guidance=1.0)
    counts = []
    for window in (None, 3):
        ids = decode_image_ids(gpt, jobs, sampling.model_copy(update={"jacobi_window": window}), seed=1).flatten(1)
        counts.append((ids[:, 0] * 6 + ids[:, 2]).bincount(minlength=36) / len(jobs))
    assert (counts[0] - counts[1]).abs().sum() / 2 < 0.2  # two draws of 400 from one distribution: about 0.12


def test_the_likelihood_is_that_of_whole_passes(gpt: GPT) -> None:
    ids = decode_image_ids(gpt, JOBS, SETTINGS[0], seed=5)
    with torch.no_grad():
        hidden = gpt(gpt.layout.join(pad_texts([list(job.condition) for job in JOBS], 5), ids.flatten(1)))
        log_p = gpt.image_logits(hidden[:, gpt.layout.image_targets(reversed_order=False)]).log_softmax(-1)
    expected = log_p.gather(-1, ids.flatten(1)[..., None]).squeeze(-1).mean(1)
    torch.testing.assert_close(likelihood_scores(gpt, ids, [job.condition for job in JOBS]), expected)


def test_what_was_kept_behind_a_hole_ranks_what_was_drawn_in_it(gpt: GPT) -> None:
    """A GPT that has learned that the last ids repeat the first ones: only the likelihood of all knows which fits."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(gpt.parameters(), 3e-3)
    for _ in range(120):
        half_B3 = torch.randint(6, (32, 3), generator=generator)
        image_BI = torch.cat((half_B3, half_B3), dim=1)
        hidden = gpt(gpt.layout.join(pad_texts([[1]] * 32, 5), image_BI))
        logits = gpt.image_logits(hidden[:, gpt.layout.image_targets(reversed_order=False)])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), image_BI.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gpt.eval()
    jobs = [Job((1,), 0, i, fixed=(None, None, None, 4, 0, 2)) for i in range(60)]
    ids = decode_image_ids(gpt, jobs, SamplingConfig(guidance=1.0), seed=0).flatten(1)
    true = torch.tensor([4, 0, 2, 4, 0, 2])
    candidates = torch.cat((ids[(ids != true).any(1)][:30], true[None])).reshape(-1, 3, 2)
    assert int(likelihood_scores(gpt, candidates, [(1,)] * len(candidates)).argmax()) == len(candidates) - 1


@pytest.fixture
def pipeline(model_folders: Path) -> TextToImage:
    return TextToImage.load(model_folders, "cpu")


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def given_ids(pipeline: TextToImage, picture: np.ndarray) -> np.ndarray:
    return pipeline.vq.encode(to_tensor(picture)[None])[0].numpy()


MASK = np.zeros((16, 16), bool)
MASK[5, 7] = MASK[15, 0] = True
CELLS = {  # of 4 x 4 pixels in a 4 x 4 grid: redrawn ones
    Box(4, 4, 8, 4): [(1, 1), (1, 2)],
    Box(3, 4, 2, 1): [(1, 0), (1, 1)],
    KeepTop(0.5): [(y, x) for y in (2, 3) for x in range(4)],
    KeepTop(0.7): [(y, x) for y in (2, 3) for x in range(4)],
}


@pytest.mark.parametrize("change", [*CELLS, Mask(MASK)], ids=lambda change: type(change).__name__)
def test_cells_that_are_not_touched_keep_their_ids(pipeline: TextToImage, picture: np.ndarray, change) -> None:
    redrawn = CELLS[change] if not isinstance(change, Mask) else [(1, 1), (3, 0)]
    kept = np.ones((4, 4), bool)
    kept[tuple(zip(*redrawn, strict=True))] = False
    samples = pipeline.edit(picture, "a red square", change, n=5)
    assert [sample.image_index for sample in samples] == [0, 1, 2, 3, 4]
    for sample in samples:
        assert np.array_equal(sample.image_ids_HW[kept], given_ids(pipeline, picture)[kept])
        assert sample.n_passes == len(redrawn) + bool(kept[0, 0]) and sample.scores == {}
    assert len({tuple(sample.image_ids_HW[~kept]) for sample in samples}) > 1


def test_everything_kept_is_the_reconstruction_and_nothing_kept_is_generating(
    pipeline: TextToImage, picture: np.ndarray
) -> None:
    (kept,) = pipeline.edit(picture, "a red square", Mask(np.zeros((16, 16), bool)))
    ids_1HW = pipeline.vq.encode(to_tensor(picture)[None])
    assert np.array_equal(kept.image_HW3, to_uint8(pipeline.vq.decode(ids_1HW))[0])
    drawn = pipeline.generate("a red square", n=3)
    for change in (Mask(np.ones((16, 16), bool)), Box(0, 0, 16, 16), Vary(1.0)):
        for a, b in zip(pipeline.edit(picture, "a red square", change, n=3), drawn, strict=True):
            assert np.array_equal(a.image_HW3, b.image_HW3) and a.n_passes == b.n_passes == 16


@pytest.mark.parametrize("scorer", ["likelihood", "clip", "caption", "both", "all"])
def test_the_best_by_the_scorer_come_first(pipeline: TextToImage, picture: np.ndarray, scorer: str) -> None:
    every = pipeline.edit(picture, "a red square", KeepTop(0.5), n=6, rerank=6, scorer=scorer)
    values = [sample.scores[scorer] for sample in every]
    assert values == sorted(values, reverse=True)
    assert set(every[0].scores) == {
        "both": {"clip", "caption", "both"}, "all": {"likelihood", "clip", "caption", "all", "both"} - {"both"},
    }.get(scorer, {scorer})  # fmt: skip
    best = pipeline.edit(picture, "a red square", KeepTop(0.5), n=2, rerank=6, scorer=scorer)
    assert [sample.image_index for sample in best] == [sample.image_index for sample in every[:2]]


def test_a_variation_redraws_its_share_of_cells_others_each_time(pipeline: TextToImage, picture: np.ndarray) -> None:
    cells = [varied_cells(0.25, 4, 4, seed, i) for seed in (0, 1) for i in range(3)]
    assert all(one.sum() == 4 for one in cells) and len({one.tobytes() for one in cells}) == 6
    assert varied_cells(0.001, 4, 4, 0, 0).sum() == 1
    for sample in pipeline.edit(picture, "", Vary(0.25), n=3):
        kept = ~varied_cells(0.25, 4, 4, 0, sample.image_index)
        assert np.array_equal(sample.image_ids_HW[kept], given_ids(pipeline, picture)[kept])


def test_a_larger_canvas_is_fitted_to_the_grid_and_its_picture_kept(pipeline: TextToImage, picture) -> None:
    canvas = open_canvas(picture, Extend(8, 0, 8, 16))
    assert canvas.image_HW3.shape == (32, 32, 3) and np.array_equal(canvas.image_HW3[:16, 8:24], picture)
    assert (canvas.redrawn_HW.sum(), canvas.redrawn_HW[:16, 8:24].any()) == (32 * 32 - 16 * 16, False)
    assert (canvas.shown()[canvas.redrawn_HW] == GREY).all()
    (sample,) = pipeline.edit(picture, "x", Extend(8, 0, 8, 16), pasted=Paste())
    assert sample.n_passes == 12 and np.array_equal(sample.image_HW3[:16, 8:24], picture)
    with pytest.raises(DataError, match="32 x 16 pixels: expected the shape of the model's grid of 4 rows of 4 cells"):
        pipeline.edit(picture, "x", Extend(16, 0, 0, 0))
    (wide,) = pipeline.with_grid(4, 8).edit(picture, "x", Extend(16, 0, 0, 0))
    ids_HW = given_ids(pipeline, open_canvas(picture, Extend(16, 0, 0, 0)).image_HW3)
    assert wide.image_HW3.shape == (16, 32, 3) and np.array_equal(wide.image_ids_HW[:, 4:], ids_HW[:, 4:])


def test_pasted_pixels_are_the_given_ones_and_a_feather_goes_over_into_the_drawn(pipeline: TextToImage) -> None:
    large = np.random.default_rng(1).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    change = Box(20, 20, 10, 12)
    canvas = open_canvas(large, change)
    plain, pasted = (pipeline.edit(Image.fromarray(large), "x", change, pasted=how)[0] for how in (None, Paste()))
    assert plain.image_HW3.shape == (16, 16, 3)
    assert np.array_equal(pasted.image_HW3[~canvas.redrawn_HW], large[~canvas.redrawn_HW])
    assert not np.array_equal(pasted.image_HW3, large)
    black, row = np.zeros((1, 6, 3), np.uint8), np.array([[True, True, False, False, False, False]])
    white = np.full_like(black, 255)
    found = paste(Canvas(black, row), white, Paste(feather_px=2))[0, :, 0].tolist()
    assert found == [255, 255, 170, 85, 0, 0]


def test_cells_of_several_ids_are_kept_whole() -> None:
    ids_HW = torch.arange(8).reshape(2, 4)
    redrawn_YX = np.array([[True, False], [False, False]])
    assert fix_kept(ids_HW, redrawn_YX) == (None, None, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Box(10, 0, 7, 4), "box 10 0 7 4 .* inside the picture's 16 x 16"),
        (Box(-1, 0, 4, 4), "box -1"),
        (Box(0, 0, 0, 4), "box 0 0 0 4"),
        (KeepTop(1.0), "found 1, expected more than 0, less than 1"),
        (KeepTop(float("nan")), "found nan"),
        (Extend(0, 0, 0, 0), "extend by 0 0 0 0"),
        (Extend(0, -4, 0, 0), "extend by 0 -4"),
        (Vary(0.0), "share to vary: found 0"),
        (Mask(np.zeros((4, 5), bool)), "mask: 5 x 4 pixels, the picture has 16 x 16"),
    ],
)
def test_changes_that_are_none_of_the_picture_are_refused(pipeline: TextToImage, picture, change, told: str) -> None:
    with pytest.raises((PromptError, DataError), match=told):
        pipeline.edit(picture, "x", change)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": 0}, "found 0"),
        ({"n": 3, "rerank": 2}, "only 2 candidates"),
        ({"rerank": 0}, "found 0"),
        ({"scorer": "beauty"}, "scorer: found 'beauty'"),
        ({"pasted": Paste(-1)}, "feather of -1"),
        ({"negative": "red " * 20}, "the model reads 12"),
    ],
)
def test_options_that_make_no_sense_are_refused(pipeline: TextToImage, picture, options: dict, told: str) -> None:
    with pytest.raises(PromptError, match=told):
        pipeline.edit(picture, "x", KeepTop(0.5), **options)


def test_what_does_not_go_together_is_refused(pipeline: TextToImage, picture: np.ndarray) -> None:
    with pytest.raises(PromptError, match="nothing can be pasted"):
        pipeline.edit(picture, "x", Vary(0.5), pasted=Paste())
    with pytest.raises(DataError, match="expected uint8"):
        pipeline.edit(picture.astype(np.float32), "x", KeepTop(0.5))
    pipeline.clip = None
    assert set(pipeline.edit(picture, "x", KeepTop(0.5), rerank=2, scorer="all")[0].scores) == {
        "likelihood", "caption", "all",
    }  # fmt: skip
    with pytest.raises(PromptError, match="has no CLIP"):
        pipeline.edit(picture, "x", KeepTop(0.5), rerank=2, scorer="clip")


def test_the_models_own_grid_given_as_another_draws_the_same(make_gpt, gpt_kind: dict, pipeline: TextToImage) -> None:
    gpt = make_gpt(**gpt_kind)
    if not gpt.config.turns and gpt.config.positions != "learned":
        with pytest.raises(ConfigError, match="expected a model of rotary or learned ones"):
            gpt.with_grid(3, 2)
        return
    jobs = [job._replace(fixed=()) for job in JOBS]
    own, same = (decode_image_ids(one, jobs, SETTINGS[1], seed=5) for one in (gpt, gpt.with_grid(3, 2)))
    assert torch.equal(own, same)


@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_a_grid_of_fewer_rows_sees_what_the_whole_one_sees_of_them(make_gpt, kind: str) -> None:
    gpt = make_gpt(kind)
    jobs, sampling = [job._replace(fixed=()) for job in JOBS], SamplingConfig(guidance=3.0)
    whole = decode_image_ids(gpt, jobs, sampling, seed=5)
    short = gpt.with_grid(2, 2)
    assert torch.equal(decode_image_ids(short, jobs, sampling, seed=5), whole[:, :2])
    assert gpt.layout.image_length == 6 and short.layout.image_length == 4
    assert all(a is b for a, b in zip(gpt.parameters(), short.parameters(), strict=True))


def test_grids_that_positions_have_no_place_for_are_refused(make_gpt, pipeline: TextToImage) -> None:
    assert make_gpt("rotary").with_grid(7, 9).layout.image_length == 63
    for height, width in ((4, 2), (3, 3)):
        with pytest.raises(ConfigError, match=f"{height} x {width} ids: the model has learned positions for 3 x 2"):
            make_gpt("learned").with_grid(height, width)
    with pytest.raises(ConfigError, match="expected 1 or more rows and columns"):
        pipeline.with_grid(0, 4)
    (sample,) = pipeline.with_grid(3, 5).generate("a red square", rerank=2, scorer="both")
    assert sample.image_HW3.shape == (12, 20, 3)
