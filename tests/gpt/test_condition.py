"""Vectors, labels and images of low resolution before an image, as texts are: equal paths, padding that changes
nothing, a null condition."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vqt2i.checkpoint import load_model, save_model
from vqt2i.generation.compiled import CompiledDrawing, CompiledEngine, compile_step
from vqt2i.generation.decode import Job, PlainDrawing, decode_image_ids
from vqt2i.generation.int8 import to_int8
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import (
    GPT,
    Condition,
    ConditionBatch,
    FeatureCondition,
    GPTConfig,
    LabelCondition,
    LayoutConfig,
    LinearProjection,
    LossWeights,
    LowResolution,
    LowResolutionCondition,
    MLPProjection,
    VectorCondition,
    Vectors,
    gpt_loss,
)
from vqt2i.nn.sparsity import PivotWindowConfig, RowColumnConfig
from vqt2i.nn.transformer import TransformerConfig

WIDTH = 8
LOW = {"condition": LowResolutionCondition(), "grid_height": 2, "grid_width": 4}
EMBEDDING = VectorCondition(width=WIDTH, encoder="c")
FEATURES = VectorCondition(n_vectors=4, width=WIDTH, projection=MLPProjection(width=12, bias=False), encoder="c")
T5 = FeatureCondition(**FEATURES.model_dump(exclude={"kind"}))
KINDS = {
    "CLIP-GEN": {"condition": EMBEDDING, "positions": "sequence"},
    "CLIP-GEN, rotary": {"condition": EMBEDDING},
    "T5 features": {"condition": FEATURES},
    "T5 features, learned positions": {"condition": FEATURES, "positions": "learned"},
    "T5 features, positions of the whole": {"condition": FEATURES, "positions": "sequence"},
    "label": {"condition": LabelCondition(n_labels=3)},
    "LlamaGen, features": {"condition": T5, "positions": "rotary_image"},
    "LlamaGen, label": {"condition": LabelCondition(n_labels=3), "positions": "rotary_image"},
    "unconditional": {"condition": LabelCondition(), "positions": "raster"},
    "CogView's super-resolution": LOW | {"positions": "sequence"},
    "CogView's super-resolution, its marks": LOW | {"positions": "sequence", "image_marks": "paired"},
    "low resolution, paired marks, learned padding": LOW | {"padding": "learned", "image_marks": "paired"},
    "low resolution, rotary": LOW,
    "low resolution, DALL-E's choices": LOW | {
        "positions": "learned", "padding": "learned", "sparsity": RowColumnConfig(conv_size=3),
    },
    "low resolution, raster positions, pivots": LOW | {
        "positions": "raster", "sparsity": PivotWindowConfig(n_pivots=2, block_size=2, n_blocks=1),
    },
}  # fmt: skip
GUIDED = SamplingConfig(guidance=3.0)
ENGINE_SETTINGS = [
    SamplingConfig(guidance=1.0),
    GUIDED,
    SamplingConfig(guidance=3.0, guidance_interval=(0.3, 0.8), top_k=3, temperature=0.7),
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def vectors(n: int, seed: int) -> Vectors:
    return Vectors(n, np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32).tobytes())


def conditions(gpt: GPT) -> list[Condition]:
    """Two conditions that differ, the first one again, and a null."""
    config = gpt.config.condition
    if isinstance(config, LabelCondition):
        return [0, min(2, config.n_labels), 0, config.n_labels]
    if isinstance(config, LowResolutionCondition):
        return [LowResolution(*c) for c in (((7, 8), (5, 0)), ((1, 2, 3, 4), (2, 2)), ((7, 8), (5, 0)), ((), (1, 3)))]
    first = vectors(min(2, config.n_vectors), 0)
    return [first, vectors(config.n_vectors, 1), first, Vectors(config.n_vectors)]


def images(gpt: GPT, n: int) -> Tensor:
    return torch.randint(6, (n, gpt.layout.image_length), generator=torch.Generator().manual_seed(0))


def padded(gpt: GPT, given: list[Condition]) -> ConditionBatch:
    """A batch as training has it: as long as the longest possible."""
    return gpt.reader.collate(given, gpt.device, whole=True)


def image_logits(gpt: GPT, given: list[Condition], image_BI: Tensor) -> Tensor:
    """Logits of every image id, by whole sequences."""
    whole = gpt.reader(gpt.reader.collate(given, gpt.device)).then(gpt.layout.image_part(image_BI))
    return gpt.image_logits(gpt(whole.until(-1))[:, -gpt.layout.image_length :])


@torch.no_grad()
def test_a_row_of_a_batch_has_the_logits_it_has_alone_and_unpadded(make_gpt, kind: dict) -> None:
    gpt = make_gpt(**kind)
    image_BI = images(gpt, 4)
    given = conditions(gpt)
    together = image_logits(gpt, given, image_BI)
    for row, condition in enumerate(given):
        torch.testing.assert_close(together[row], image_logits(gpt, [condition], image_BI[row : row + 1])[0])


@torch.no_grad()
def drawn_naively(gpt: GPT, job: Job, scale: float) -> list[int]:
    """The likeliest ids, guided, by whole sequences."""
    ids: list[int] = []
    for _ in range(gpt.layout.image_length):
        logits = []
        for condition in (job.condition, gpt.reader.null(job.condition)):
            prefix = gpt.reader(gpt.reader.collate([condition], gpt.device))
            hidden = gpt(prefix.then(gpt.layout.image_part(torch.tensor([ids], dtype=torch.long))))
            logits.append(gpt.image_logits(hidden[:, -1])[0])
        ids.append(int(torch.lerp(logits[1], logits[0], scale).argmax()))
    return ids


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_decoding_with_shared_prefixes_equals_whole_sequences(make_gpt, kind: dict, guidance: float) -> None:
    gpt = make_gpt(**kind)
    jobs = [Job(condition, prompt, i) for prompt, condition in enumerate(conditions(gpt)) for i in range(2)]
    found = decode_image_ids(gpt, jobs, SamplingConfig(guidance=guidance, top_k=1), seed=0).flatten(1)
    assert found.tolist() == [drawn_naively(gpt, job, guidance) for job in jobs]


def test_an_image_depends_on_no_neighbour_and_no_batch(make_gpt, kind: dict) -> None:
    gpt = make_gpt(**kind)
    jobs = [Job(condition, prompt, i) for prompt, condition in enumerate(conditions(gpt)) for i in range(2)]
    expected = decode_image_ids(gpt, jobs, GUIDED, seed=5)
    assert torch.equal(decode_image_ids(gpt, jobs[::-1], GUIDED, seed=5, rows_at_once=3).flip(0), expected)


def test_each_condition_is_read_once_and_its_null_once(make_gpt) -> None:
    gpt, sizes = make_gpt(condition=FEATURES), []
    jobs = [Job(vectors(n, n), n, i) for n in (2, 2, 4) for i in range(2)]
    gpt.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    decode_image_ids(gpt, jobs, GUIDED, seed=0)
    # four images of two vectors and two of four; the null of each length by itself
    assert sizes[:4] == [(1, 2), (1, 4), (1, 2), (1, 4)] and sizes[4:] == [(12, 1)] * 5


def test_guidance_of_the_null_changes_nothing_and_0_ignores_the_condition(make_gpt, kind: dict) -> None:
    gpt = make_gpt(**kind)
    given = [c for c in conditions(gpt) if not isinstance(c, Vectors) or c.n == conditions(gpt)[-1].n]
    jobs, nulls = ([Job(c, i, 0) for i, c in enumerate(cs)] for cs in (given, map(gpt.reader.null, given)))
    plain = decode_image_ids(gpt, list(nulls), SamplingConfig(guidance=1.0), seed=5)
    assert torch.equal(decode_image_ids(gpt, list(jobs), SamplingConfig(guidance=0.0), seed=5), plain)
    nulls = [Job(gpt.reader.null(c), i, 0) for i, c in enumerate(given)]
    assert torch.equal(decode_image_ids(gpt, nulls, GUIDED, seed=5), plain)


@torch.no_grad()
def test_a_dropped_row_is_the_null(make_gpt, kind: dict) -> None:
    gpt = make_gpt(**kind)
    image_BI = images(gpt, 4)
    batch = padded(gpt, conditions(gpt))
    dropped = gpt.reader.dropped(batch, torch.tensor([True, False, True, True]))
    nulls = [gpt.reader.null(c) if at != 1 else c for at, c in enumerate(conditions(gpt))]
    weights = LossWeights()
    found, expected = (gpt_loss(gpt, b, image_BI, 0, weights) for b in (dropped, padded(gpt, nulls)))
    assert torch.equal(found.total, expected.total)


@torch.no_grad()
def test_the_loss_is_that_of_the_image_alone(make_gpt, kind: dict) -> None:
    gpt = make_gpt(**kind)
    image_BI = images(gpt, 4)
    loss = gpt_loss(gpt, padded(gpt, conditions(gpt)), image_BI, 0, LossWeights(image=2.0, z=0.1))
    logits = image_logits(gpt, conditions(gpt), image_BI)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), image_BI.flatten())
    torch.testing.assert_close(loss.image, nll)
    torch.testing.assert_close(loss.total, 2 * nll + 0.1 * logits.logsumexp(-1).square().mean())
    assert loss.text.isnan() and loss.text_from_image.isnan() and loss.image_unconditional.isnan()


def test_every_weight_learns_but_those_of_other_labels(make_gpt, kind: dict) -> None:
    gpt = make_gpt(**kind)
    gpt_loss(gpt, padded(gpt, conditions(gpt)), images(gpt, 4), 0, LossWeights()).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gpt.parameters())


def jobs_of_one_length(gpt: GPT) -> list[Job]:
    """Two images of each of four conditions, which have one null in common."""
    config = gpt.config.condition
    given = conditions(gpt)
    if isinstance(config, VectorCondition):
        given = [vectors(config.n_vectors, 0), vectors(config.n_vectors, 1), given[-1], vectors(config.n_vectors, 0)]
    return [Job(condition, prompt, image) for prompt, condition in enumerate(given) for image in range(2)]


@pytest.mark.parametrize("sampling", ENGINE_SETTINGS, ids=str)
def test_the_native_steps_draw_the_images_of_the_plain_ones(make_gpt, kind: dict, sampling: SamplingConfig) -> None:
    gpt = make_gpt(**kind)
    native = NativeGPT(gpt, "fp32")
    ragged = [Job(condition, prompt, 0) for prompt, condition in enumerate(conditions(gpt))]
    for jobs in (ragged, jobs_of_one_length(gpt)):
        expected = decode_image_ids(gpt, jobs, sampling, seed=5)
        for rows in (64, 3):
            assert torch.equal(decode_image_ids(native, jobs, sampling, seed=5, rows_at_once=rows), expected)


def uncompiled(step: Callable, gpt: GPT) -> Callable:
    return step


def require_equal_drawings(gpt: GPT, engine: CompiledEngine, sampling: SamplingConfig) -> None:
    jobs = jobs_of_one_length(gpt)
    expected = decode_image_ids(gpt, jobs, sampling, seed=5)
    assert torch.equal(decode_image_ids(gpt, jobs, sampling, seed=5, start=engine), expected)
    # other images in the tensors of the first
    assert torch.equal(decode_image_ids(gpt, jobs[::-1], sampling, seed=5, start=engine).flip(0), expected)


@pytest.mark.parametrize("sampling", ENGINE_SETTINGS, ids=str)
def test_steps_of_fixed_shapes_draw_what_plain_steps_draw(make_gpt, kind: dict, sampling: SamplingConfig) -> None:
    gpt = make_gpt(**kind)
    require_equal_drawings(gpt, CompiledEngine(gpt, uncompiled), sampling)


@pytest.mark.parametrize("name", ["T5 features", "label"])
def test_compiled_steps_draw_the_images_of_the_plain_ones(make_gpt, name: str) -> None:
    gpt, graphs = make_gpt(**KINDS[name]), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    require_equal_drawings(gpt, CompiledEngine(gpt, lambda step, gpt: compile_step(step, gpt, backend)), GUIDED)
    assert len(graphs) == 1  # each step is one graph, and here is none but guided ones


@pytest.mark.parametrize("name", KINDS)
def test_fixed_shapes_serve_all_conditions_but_those_of_unequal_length(make_gpt, name: str) -> None:
    gpt = make_gpt(**KINDS[name])
    uniform_IB = torch.rand(gpt.layout.image_length, 8, dtype=torch.double)
    engine, ragged = CompiledEngine(gpt, uncompiled), jobs_of_one_length(make_gpt(**KINDS[name]))
    if gpt.layout.is_upscaling:  # each of these has a null of its own
        assert isinstance(engine(ragged, uniform_IB, GUIDED), PlainDrawing)
        return
    assert isinstance(engine(ragged, uniform_IB, GUIDED), CompiledDrawing)
    if gpt.layout.prefix_length > 1:
        ragged[0] = Job(vectors(2, 0), 0, 0)
        assert isinstance(engine(ragged, uniform_IB, GUIDED), PlainDrawing)


def test_8_bit_matrices_leave_the_condition_in_full(make_gpt) -> None:
    gpt = make_gpt(condition=FEATURES)
    given = [vectors(4, 0)]
    a, b = (twin.reader(twin.reader.collate(given, gpt.device)).vectors_BND for twin in (gpt, to_int8(gpt)))
    assert torch.equal(a, b)


@torch.no_grad()
def test_what_is_saved_and_loaded_is_the_same(make_gpt, kind: dict, tmp_path) -> None:
    gpt = make_gpt(**kind)
    save_model(tmp_path / "gpt", gpt, gpt.config, {})
    loaded = load_model(tmp_path / "gpt", GPTConfig, GPT)
    assert loaded.config == gpt.config
    given = conditions(gpt)
    assert torch.equal(image_logits(loaded, given, images(gpt, 4)), image_logits(gpt, given, images(gpt, 4)))


def test_there_are_no_more_ids_than_of_images_and_labels(make_gpt) -> None:
    sizes = {name: tuple(make_gpt(**KINDS[name]).embedding.weight.shape) for name in KINDS}
    assert sizes["CLIP-GEN"] == sizes["T5 features"] == (6, 32)
    assert sizes["label"] == (6 + 4, 32) and sizes["unconditional"] == (6 + 1, 32)
    published = make_gpt(condition=EMBEDDING, positions="sequence")
    assert published.layout.length == 7 and published.head.weight.shape == (6, 32)
    assert isinstance(published.reader.projection, torch.nn.Linear) and EMBEDDING.projection == LinearProjection()


@pytest.mark.parametrize(
    ("layout", "values", "told"),
    [
        ({"n_text_ids": 4, "text_length": 2}, {"condition": EMBEDDING}, "condition vectors: found layout.n_text_ids 4"),
        ({}, {}, "condition text: found layout.n_text_ids 0, layout.text_length 0, text_tokenizer None"),
        ({}, {"condition": EMBEDDING, "text_tokenizer": "t"}, "found text_tokenizer t"),
        ({"padding": "learned"}, {"condition": EMBEDDING}, "found learned padding"),
        ({}, {"condition": LOW["condition"]}, "condition low_resolution: found layout.n_text_ids 0"),
    ],
)
def test_sizes_of_texts_belong_to_texts_only(layout: dict, values: dict, told: str) -> None:
    sizes = LayoutConfig(n_image_ids=6, grid_height=3, grid_width=2, **layout)
    with pytest.raises(ValidationError, match=told):
        GPTConfig(transformer=TransformerConfig(), layout=sizes, image_tokenizer="i", **values)


def test_low_resolution_needs_a_grid_with_a_half_and_reads_its_text_first(make_gpt) -> None:
    for sizes in ({"grid_height": 3}, {"grid_width": 3}, {"null_condition": "image_first"}):
        with pytest.raises(ValidationError, match="expected even sides, and empty_text"):
            make_gpt(**LOW | sizes)
