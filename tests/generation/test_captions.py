"""Texts from images: the cached search against all texts there are, one by one."""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vqt2i.checkpoint import save_model
from vqt2i.data.sources import read_image
from vqt2i.errors import CheckpointError, DataError, PromptError
from vqt2i.generation import BeamConfig, DrawConfig, TextToImage
from vqt2i.generation.captions import beam_search, draw_texts, require_reads_images, rerank
from vqt2i.gpt import GPT, LossWeights, caption_log_probability, gpt_loss
from vqt2i.text import pad_texts

SIZES = {"n_text_ids": 3, "text_length": 3}
EVERY_TEXT = [list(ids) for n in range(4) for ids in product(range(3), repeat=n)]


def images(n: int = 3) -> Tensor:
    return torch.randint(6, (n, 6), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def all_log_p(gpt: GPT, image_I: Tensor) -> dict[tuple[int, ...], float]:
    """log p of every text and its EOT, from whole sequences; where nothing ends a text, of every one of 3 ids."""
    texts = [ids for ids in EVERY_TEXT if len(ids) == 3 or not gpt.layout.has_pairs]
    text = pad_texts(texts, 3)
    n_scored_B = text.n_ids_B + (not gpt.layout.has_pairs)
    log_p = caption_log_probability(gpt, text, image_I.expand(len(texts), -1)) * n_scored_B
    return {tuple(ids): float(value) for ids, value in zip(texts, log_p, strict=True)}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_search_wide_enough_finds_the_best_of_all_texts(make_gpt, two_way_kind: dict, exponent: float) -> None:
    gpt = make_gpt(**two_way_kind, **SIZES)
    found = beam_search(gpt, images(), 5, BeamConfig(n_beams=27, length_exponent=exponent))
    for image_I, texts in zip(images(), found, strict=True):
        values = all_log_p(gpt, image_I)
        best = sorted(values, key=lambda ids: -values[ids] / (len(ids) + 1) ** exponent)[:5]
        assert [text.ids for text in texts] == best
        assert [text.log_p for text in texts] == pytest.approx([values[ids] for ids in best], rel=1e-4)


def test_a_narrow_search_finds_what_beginnings_read_anew_would_find(make_gpt) -> None:
    gpt = make_gpt(**SIZES)
    for image_I in images():
        beams, done = {(): 0.0}, {}
        values = all_log_p(gpt, image_I)
        # log p of a beginning: that of all texts that begin so
        begins = {ids: np.logaddexp.reduce([v for t, v in values.items() if t[: len(ids)] == ids]) for ids in values}
        for _ in range(4):
            done |= {ids: values[ids] for ids in beams}
            longer = [(*ids, i) for ids in beams for i in range(3) if len(ids) < 3]
            beams = dict.fromkeys(sorted(longer, key=lambda ids: -begins[ids])[:2])
        expected = max(done, key=lambda ids: done[ids] / (len(ids) + 1))
        ((text,),) = beam_search(gpt, image_I[None], 1, BeamConfig(n_beams=2, length_exponent=1))
        assert text.ids == expected


@pytest.mark.parametrize("how", [BeamConfig(n_beams=4), BeamConfig(n_beams=4, rerank=False), DrawConfig()], ids=str)
def test_an_image_gets_the_captions_it_gets_alone_and_equal_calls_are_equal(
    model_folders: Path, how: BeamConfig | DrawConfig
) -> None:
    pipeline = TextToImage.load(model_folders, "cpu")
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), dtype=np.uint8))
    together = pipeline.caption(pictures, n=2, how=how)
    assert [[c.image_index for c in group] for group in together] == [[0, 0], [1, 1], [2, 2]]
    assert pipeline.caption(pictures, n=2, how=how) == together
    alone = pipeline.caption([Image.fromarray(pictures[0])], n=2, how=how)[0]
    assert [c.ids for c in alone] == [c.ids for c in together[0]]
    assert [c.log_p for c in alone] == pytest.approx([c.log_p for c in together[0]], rel=1e-4)
    assert together[0][0].text == pipeline.text.decode(list(together[0][0].ids))


def test_many_images_are_captioned_in_parts_with_the_same_texts(model_folders: Path, monkeypatch) -> None:
    pipeline = TextToImage.load(model_folders, "cpu")
    pictures = list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    for how in (BeamConfig(n_beams=4), DrawConfig()):
        whole = pipeline.caption(pictures, n=2, how=how)
        monkeypatch.setattr("vqt2i.generation.captions.ROWS_AT_ONCE", 8)
        assert [[c.ids for c in group] for group in pipeline.caption(pictures, n=2, how=how)] == [
            [c.ids for c in group] for group in whole
        ]


def test_drawn_texts_have_the_models_shares(make_gpt) -> None:
    gpt, image_BI = make_gpt(**SIZES), images(1)
    values = all_log_p(gpt, image_BI[0])
    (found,) = draw_texts(gpt, image_BI, 4000, DrawConfig(), [(0,)])
    ids = [text.ids for text in found]
    assert all(text.log_p == pytest.approx(values[text.ids], rel=1e-4) for text in found[:100])
    for text in sorted(values, key=lambda ids: -values[ids])[:5]:
        assert ids.count(text) / 4000 == pytest.approx(np.exp(values[text]), abs=0.025)


def test_a_cold_draw_is_the_likeliest_id_each_time_and_seeds_differ(make_gpt) -> None:
    gpt, image_BI = make_gpt(**SIZES), images(1)
    cold = draw_texts(gpt, image_BI, 4, DrawConfig(temperature=1e-4), [(0,)])[0]
    assert len({text.ids for text in cold}) == 1
    assert cold[0].ids == beam_search(gpt, image_BI, 1, BeamConfig(n_beams=1))[0][0].ids
    assert draw_texts(gpt, image_BI, 4, DrawConfig(top_p=1e-4), [(0,)])[0] == cold
    first, second = (draw_texts(gpt, image_BI, 8, DrawConfig(), [(seed,)])[0] for seed in (0, 1))
    assert [text.ids for text in first] != [text.ids for text in second]


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
@torch.no_grad()
def test_reranked_texts_are_in_the_order_of_both_directions(make_gpt, weight: float) -> None:
    gpt, image_BI = make_gpt(**SIZES), images()
    groups = beam_search(gpt, image_BI, 6, BeamConfig(n_beams=6))
    for image_I, before, after in zip(image_BI, groups, rerank(gpt, image_BI, groups, weight), strict=True):
        assert {text.ids for text in before} == {text.ids for text in after}
        for text in after:
            forth = gpt_loss(gpt, pad_texts([list(text.ids)], 3), image_I[None], 0, LossWeights())
            assert text.image_log_p == pytest.approx(-len(image_I) * float(forth.image), rel=1e-5)
        both = [weight * text.log_p + text.image_log_p for text in after]
        assert both == sorted(both, reverse=True)


def test_texts_that_nothing_ends_have_as_many_ids_as_are_asked_for(make_gpt) -> None:
    gpt = make_gpt(image_marks="paired", text_length=30)
    for how in (BeamConfig(n_beams=3), DrawConfig()):
        find = partial(beam_search, n=2, config=how) if isinstance(how, BeamConfig) else partial(
            draw_texts, n=2, config=how, seeds=[(i,) for i in range(3)]
        )  # fmt: skip
        assert {len(text.ids) for group in find(gpt, images()) for text in group} == {20}
        find.keywords["config"] = how.model_copy(update={"n_ids": 4})
        for image_I, group in zip(images(), find(gpt, images()), strict=True):
            for text in group:
                assert len(text.ids) == 4 and max(text.ids) < gpt.layout.eot
                score = caption_log_probability(gpt, pad_texts([list(text.ids)], 30), image_I[None])
                assert text.per_token == pytest.approx(float(score), rel=1e-4)


def test_texts_that_end_have_no_length_to_ask_for(model_folders: Path) -> None:
    pipeline = TextToImage.load(model_folders, "cpu")
    with pytest.raises(PromptError, match="captions of 4 ids: this GPT says itself where a text ends"):
        pipeline.caption([np.zeros((16, 16, 3), np.uint8)], how=BeamConfig(n_ids=4))


def test_what_cannot_be_captioned_is_refused(model_folders: Path, tmp_path: Path) -> None:
    pipeline = TextToImage.load(model_folders, "cpu")
    picture = np.zeros((16, 16, 3), np.uint8)
    for n in (0, 65):
        with pytest.raises(PromptError, match=rf"captions of an image: found {n}.*beams \(64\)"):
            pipeline.caption([picture], n=n)
    for bad in (picture[..., 0], picture.astype(np.float32), picture[:0]):
        with pytest.raises(DataError, match=r"image 1: expected uint8 \(height, width, 3\)"):
            pipeline.caption([picture, bad])
    with pytest.raises(DataError, match=r"none\.png: missing file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png: not an image.*expected a picture"):
        read_image(tmp_path / "text.png")


def test_a_gpt_that_never_read_images_before_texts_is_refused(model_folders: Path, tmp_path: Path) -> None:
    pipeline = TextToImage.load(model_folders, "cpu")
    card = {"kind": "gpt", "config": {"training": {"reversed_share": 0.0}}}
    save_model(tmp_path / "gpt", pipeline.gpt, pipeline.gpt.config, card)
    pipeline.gpt_folder = tmp_path / "gpt"
    with pytest.raises(CheckpointError, match=r"gpt: trained with training.reversed_share 0.*above 0"):
        pipeline.caption([np.zeros((16, 16, 3), np.uint8)])
    for scorer in ("caption", "both"):
        with pytest.raises(PromptError, match="predicts no text from an image; use the scorer 'clip'"):
            pipeline.generate("a red square", rerank=2, scorer=scorer)
    assert pipeline.default_scorer == "clip"
    require_reads_images(tmp_path, card | {"reversed_share": 0.15})  # what it was fine-tuned from did
