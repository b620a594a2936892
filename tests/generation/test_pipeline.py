import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqt2i.checkpoint import CARD, load_model, read_card, save_model
from vqt2i.data.images import GREY
from vqt2i.errors import CheckpointError, PromptError
from vqt2i.generation import Mix, SamplingConfig, TextToImage
from vqt2i.generation.find import find_parts, write_pipeline
from vqt2i.generation.rerank import combine
from vqt2i.gpt import GPT, GPTConfig
from vqt2i.text.train import TextTokenizerConfig, train_text_tokenizer

PROMPTS = ["a red square", "蓝色正方形"]
HOSTILE = [
    "", " ", "红" * 10_000, "🟥" * 50, "a\0b", "\ud800 lone", "a\nb\tc\r\n",
    "\u202eright to left", "<b>&amp;</b> %s {x}",
]  # fmt: skip


@pytest.fixture
def pipeline(model_folders: Path) -> TextToImage:
    return TextToImage.load(model_folders, "cpu")


def test_what_write_pipeline_writes_draws_the_same_pictures(
    model_folders: Path, tmp_path: Path, pipeline: TextToImage
) -> None:
    write_pipeline(*find_parts(str(model_folders), tmp_path), tmp_path / "copy", "fp32")
    copy = TextToImage.load(tmp_path / "copy", "cpu")
    assert copy.fingerprints == pipeline.fingerprints and copy.config == pipeline.config
    for a, b in zip(copy.generate(PROMPTS, n=2), pipeline.generate(PROMPTS, n=2), strict=True):
        assert np.array_equal(a.image_HW3, b.image_HW3) and a.prompt == b.prompt


def test_a_snapshot_of_a_hub_is_a_pipeline_folder(model_folders: Path, tmp_path: Path, pipeline: TextToImage) -> None:
    # as huggingface_hub lays it out: every file a link into a store of contents
    snapshot, blobs = tmp_path / "snapshots" / "4f1c", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in model_folders.rglob("*") if p.is_file()):
        link = snapshot / path.relative_to(model_folders)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(blobs / str(number))
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert TextToImage.load(snapshot, "cpu").fingerprints == pipeline.fingerprints
    write_pipeline(*find_parts(str(snapshot), tmp_path), tmp_path / "copy", "fp32")
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    assert TextToImage.load(tmp_path / "copy", "cpu").fingerprints == pipeline.fingerprints


@pytest.mark.parametrize(("licences", "told"), [
    ({"vq": "MIT", "gpt": "MIT"}, "license: mit"),
    ({"vq": "MIT", "gpt": "Apache-2.0"}, None),
    ({"vq": "MIT"}, None),
])  # fmt: skip
def test_its_readme_says_the_licence_where_all_parts_have_one(
    model_folders: Path, tmp_path: Path, licences: dict[str, str], told: str | None
) -> None:
    folders, config = find_parts(str(shutil.copytree(model_folders, tmp_path / "p")), tmp_path)
    for part, licence in licences.items():
        card = read_card(folders[part]) | {"licence": licence, "source": {"file": "a.pt", "repository": "https://x"}}
        (folders[part] / CARD).write_text(json.dumps(card))
    write_pipeline(folders | {"clip": None}, config, tmp_path / "copy", "fp32")
    head, body = (tmp_path / "copy" / "README.md").read_text().split("---\n")[1:]
    assert (told in head if told else "license" not in head) and "library_name: vqt2i" in head
    assert f"- `vq/` {read_card(folders['vq'])['fingerprint'][:8]}, from a.pt of https://x, licence MIT" in body


def test_a_bf16_pipeline_is_smaller_and_loads(model_folders: Path, tmp_path: Path, pipeline: TextToImage) -> None:
    write_pipeline(*find_parts(str(model_folders), tmp_path), tmp_path / "half", "bf16")
    half = TextToImage.load(tmp_path / "half", "cpu")
    assert half.fingerprints["vq"] == pipeline.fingerprints["vq"]
    assert half.fingerprints["gpt"] != pipeline.fingerprints["gpt"]
    assert len(half.generate(PROMPTS, n=1, rerank=2)) == 2


def test_equal_settings_give_equal_samples(pipeline: TextToImage) -> None:
    a, b = (pipeline.generate(PROMPTS, n=2, rerank=3, seed=4) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x.image_HW3, y.image_HW3) and x.scores == y.scores and x.image_index == y.image_index


def test_a_candidate_is_the_same_alone_among_more_and_beside_other_prompts(pipeline: TextToImage) -> None:
    many = pipeline.candidates(PROMPTS, 4, scored=False)
    few = pipeline.candidates(PROMPTS[:1], 2, scored=False)
    for sample in few[0]:
        assert np.array_equal(sample.image_ids_HW, many[0][sample.image_index].image_ids_HW)
    assert [s.image_index for s in many[1]] == [0, 1, 2, 3] and [s.prompt_index for s in many[1]] == [1] * 4


@pytest.mark.parametrize("scorer", ["clip", "caption", "both", None])
def test_candidates_come_best_first_by_the_chosen_scorer(pipeline: TextToImage, scorer: str | None) -> None:
    for group in pipeline.candidates(PROMPTS, 5, scorer=scorer):
        values = [sample.scores[scorer or "both"] for sample in group]
        assert values == sorted(values, reverse=True) and len(set(values)) > 1
        assert set(group[0].scores) == ({"clip", "caption", "both"} if scorer in (None, "both") else {scorer})


def test_the_score_both_is_combined_within_each_prompt(pipeline: TextToImage) -> None:
    for group in pipeline.candidates(PROMPTS, 4):
        scores = {name: torch.tensor([s.scores[name] for s in group]) for name in ("clip", "caption")}
        assert [s.scores["both"] for s in group] == pytest.approx(combine(scores).tolist(), abs=1e-3)


def test_any_prompts_in_any_batches_give_the_same_pictures_and_scores_and_batches_are_full(
    pipeline: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = PROMPTS * 5
    whole = pipeline.candidates(prompts, 3)
    for most in (2, 7):
        monkeypatch.setattr("vqt2i.generation.memory.ROWS_AT_ONCE", most)
        for indices in ([], [9], [1, 4, 9], range(10)):
            drawn = []
            groups = pipeline.candidates(prompts, 3, indices=indices, on_token=drawn.append)
            assert [group[0].prompt_index for group in groups] == list(indices)
            for group in groups:
                for a, b in zip(group, whole[group[0].prompt_index], strict=True):
                    assert (a.prompt, a.image_index, a.scores) == (b.prompt, b.image_index, b.scores)
                    assert np.array_equal(a.image_HW3, b.image_HW3)
            full, rest = divmod(3 * len(indices), most)
            assert drawn == [most] * 16 * full + [rest] * 16 * (rest > 0)


def test_pictures_come_before_all_are_drawn(pipeline: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqt2i.generation.memory.ROWS_AT_ONCE", 2)
    tokens = []
    groups = pipeline.stream(PROMPTS * 3, 2, on_token=tokens.append)
    assert tokens == []
    assert [s.prompt_index for s in next(groups)] == [0, 0] and sum(tokens) == 2 * 16


def test_previews_show_what_is_drawn_and_grey_elsewhere(pipeline: TextToImage) -> None:
    seen: list[tuple[list[tuple[int, int]], np.ndarray]] = []
    groups = pipeline.candidates(
        PROMPTS, 2, scored=False,
        on_preview=lambda p: seen.append(([(j.prompt_index, j.image_index) for j in p.jobs], p.images())),
    )  # fmt: skip
    whole = np.stack([sample.image_HW3 for group in groups for sample in group])
    assert len(seen) == 16 and all(jobs == [(0, 0), (0, 1), (1, 0), (1, 1)] for jobs, _ in seen)
    assert np.array_equal(seen[-1][1], whole)
    for n_drawn, (_, images) in enumerate(seen, 1):
        # ids of a 4 x 4 grid, row by row, of 4 x 4 pixels each
        cells = images.reshape(4, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(4, 16, -1)
        assert (cells[:, n_drawn:] == GREY).all() and (cells[:, :n_drawn] != GREY).any(axis=(0, 2)).all()


def test_watching_changes_no_picture(pipeline: TextToImage) -> None:
    plain = pipeline.generate(PROMPTS, n=2)
    for look in (lambda preview: None, lambda preview: preview.images()):
        watched = pipeline.generate(PROMPTS, n=2, on_preview=look)
        assert all(np.array_equal(a.image_HW3, b.image_HW3) for a, b in zip(plain, watched, strict=True))


def test_reranking_keeps_the_best_n_of_the_same_candidates(pipeline: TextToImage) -> None:
    groups = pipeline.candidates(PROMPTS, 4, scorer="clip")
    kept = pipeline.generate(PROMPTS, n=2, rerank=4, scorer="clip")
    assert [(s.prompt, s.image_index) for s in kept] == [(s.prompt, s.image_index) for g in groups for s in g[:2]]


def test_without_reranking_nothing_is_scored(pipeline: TextToImage) -> None:
    samples = pipeline.generate(PROMPTS, n=2)
    assert [(s.prompt, s.image_index, s.scores) for s in samples] == [(p, i, {}) for p in PROMPTS for i in (0, 1)]


def test_pictures_are_the_decoded_codes(pipeline: TextToImage) -> None:
    sample = pipeline.generate(PROMPTS[:1])[0]
    assert sample.image_HW3.shape == (16, 16, 3) and sample.image_HW3.dtype == np.uint8
    decoded = pipeline.vq.decode(torch.from_numpy(sample.image_ids_HW)[None])[0]
    assert np.abs((decoded.movedim(0, -1).numpy() + 1) * 127.5 - sample.image_HW3).max() <= 0.51


def test_a_notebook_shows_a_sample_as_its_picture(pipeline: TextToImage) -> None:
    sample = pipeline.generate(PROMPTS[:1])[0]
    shown = Image.open(io.BytesIO(sample._repr_png_()))
    assert shown.format == "PNG" and np.array_equal(np.asarray(shown), sample.image_HW3)
    assert len(repr(sample)) < 200 and "a red square" in repr(sample)


def test_a_string_is_one_prompt(pipeline: TextToImage) -> None:
    alone, listed = pipeline.generate("a red square", n=2), pipeline.generate(["a red square"], n=2)
    assert [s.prompt for s in alone] == ["a red square"] * 2
    assert all(np.array_equal(a.image_HW3, b.image_HW3) for a, b in zip(alone, listed, strict=True))


def test_the_pipelines_own_sampling_is_used_unless_another_is_given(pipeline: TextToImage) -> None:
    own = pipeline.generate(PROMPTS)
    same = pipeline.generate(PROMPTS, sampling=SamplingConfig(guidance=2.0))
    other = pipeline.generate(PROMPTS, sampling=SamplingConfig(guidance=30.0, temperature=0.1))
    assert [np.array_equal(a.image_ids_HW, b.image_ids_HW) for a, b in zip(own, same, strict=True)] == [True, True]
    assert not all(np.array_equal(a.image_ids_HW, b.image_ids_HW) for a, b in zip(own, other, strict=True))


def test_hostile_prompts_are_drawn_scored_and_their_truncation_is_said(pipeline: TextToImage) -> None:
    samples = pipeline.generate(HOSTILE, n=1, rerank=2)
    assert [sample.prompt_index for sample in samples] == list(range(len(HOSTILE)))
    for sample, prompt in zip(samples, HOSTILE, strict=True):
        n_ids = len(pipeline.text.encode(prompt))
        assert sample.n_truncated == max(0, n_ids - 12)
        assert all(np.isfinite(value) for value in sample.scores.values())
        sample.prompt.encode()  # what is kept of a prompt can be written
    assert samples[2].n_truncated > 9000


def test_what_is_mixed_in_or_led_away_from_changes_the_pictures_and_the_scores_are_the_mean(
    pipeline: TextToImage,
) -> None:
    green, scored = "a green square", {"rerank": 1, "sampling": SamplingConfig(guidance=4.0)}
    plain, mixed, negative = (
        pipeline.generate(PROMPTS[0], **scored, **options)[0]
        for options in ({}, {"mix": Mix(green, 0.3)}, {"negative": green})
    )
    for sample in (mixed, negative):
        assert not np.array_equal(sample.image_ids_HW, plain.image_ids_HW)
    ids_1HW = torch.from_numpy(mixed.image_ids_HW)[None]
    finish = pipeline._finisher
    own, other = (finish.score("both", finish.decode(ids_1HW, 1), ids_1HW, text) for text in (PROMPTS[0], green))
    for name in ("clip", "caption"):
        assert mixed.scores[name] == pytest.approx(0.7 * own[name].item() + 0.3 * other[name].item(), abs=1e-5)
    same = pipeline.generate(PROMPTS[0], **scored, negative="", mix=Mix(PROMPTS[0], 0.5))[0]
    assert np.array_equal(same.image_ids_HW, plain.image_ids_HW)


def test_each_sample_says_how_many_passes_it_took(pipeline: TextToImage) -> None:
    assert [sample.n_passes for sample in pipeline.generate(PROMPTS, n=2)] == [16] * 4
    in_turn = pipeline.generate(PROMPTS, n=2, sampling=SamplingConfig(top_k=1, jacobi_window=1))
    assert [sample.n_passes for sample in in_turn] == [16] * 4


def test_no_prompts_give_no_pictures(pipeline: TextToImage) -> None:
    assert pipeline.generate([], n=3, rerank=4) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": 0}, "found 0"),
        ({"n": 0, "rerank": 2}, "found 0"),
        ({"n": 1, "rerank": 0}, "found 0"),
        ({"n": 3, "rerank": 2}, "only 2 candidates"),
        ({"n": -1, "rerank": 3}, "found -1"),
        ({"rerank": 2, "scorer": "beauty"}, "scorer: found 'beauty'"),
        ({"mix": Mix("x", 1.0)}, "share of 'x': found 1"),
        ({"mix": Mix("x", float("nan"))}, "share of 'x': found nan"),
        ({"mix": Mix("red " * 20, 0.5)}, "mixed-in text .* the model reads 12"),
        ({"negative": "red " * 20}, "negative prompt .* the model reads 12"),
        ({"negative": "x", "sampling": SamplingConfig(guidance_interval=(0, 0))}, "acts on no token"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_drawn(
    pipeline: TextToImage, options: dict, told: str
) -> None:
    tokens = []
    with pytest.raises(PromptError, match=told):
        pipeline.generate(PROMPTS, on_token=tokens.append, **options)
    assert tokens == []


def test_without_a_clip_the_caption_score_ranks_and_clip_cannot(model_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folders, tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "clip")
    pipeline = TextToImage.load(tmp_path / "p", "cpu")
    assert set(pipeline.fingerprints) == {"text", "vq", "gpt"}
    assert set(pipeline.generate(PROMPTS, rerank=2)[0].scores) == {"caption"}
    for scorer in ("clip", "both"):
        with pytest.raises(PromptError, match="has no CLIP"):
            pipeline.generate(PROMPTS, rerank=2, scorer=scorer)


def test_a_clip_of_another_size_scores_too(model_folders: Path, pipeline: TextToImage) -> None:
    config = pipeline.clip.config.model_copy(update={"image_size_px": 24})
    torch.manual_seed(0)
    pipeline.clip = type(pipeline.clip)(config).eval()
    assert len(pipeline.generate(PROMPTS, rerank=2, scorer="clip")) == 2


def test_a_text_tokenizer_of_another_training_is_refused_with_both_fingerprints(
    model_folders: Path, tmp_path: Path, pipeline: TextToImage
) -> None:
    shutil.copytree(model_folders, tmp_path / "p")
    other = train_text_tokenizer(["another corpus of words"], TextTokenizerConfig(vocabulary_size=300))
    (tmp_path / "p" / "text" / "text.model").write_bytes(other.model)
    ours, theirs = pipeline.text.fingerprint[:8], other.fingerprint[:8]
    with pytest.raises(CheckpointError, match=rf"gpt: made with text tokenizer {ours}, but this is {theirs}"):
        TextToImage.load(tmp_path / "p", "cpu")


def test_an_image_tokenizer_that_was_trained_further_is_refused(model_folders: Path, tmp_path: Path, tiny_vq) -> None:
    shutil.copytree(model_folders, tmp_path / "p")
    with torch.no_grad():
        tiny_vq.decoder.conv_out.bias += 0.01
    save_model(tmp_path / "p" / "vq", tiny_vq, tiny_vq.config, {})
    with pytest.raises(CheckpointError, match="made with image tokenizer"):
        TextToImage.load(tmp_path / "p", "cpu")


@pytest.mark.parametrize("part", ["text", "vq", "gpt"])
def test_a_missing_part_is_named(model_folders: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(model_folders, tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / part)
    with pytest.raises(CheckpointError, match=rf"p/{part}"):
        TextToImage.load(tmp_path / "p", "cpu")


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no pipeline\.yaml"):
        TextToImage.load(tmp_path, "cpu")


def test_prompts_stay_as_they_were(pipeline: TextToImage) -> None:
    prompts = list(PROMPTS)
    pipeline.generate(prompts, n=2, rerank=2)
    assert prompts == PROMPTS


def test_the_grid_follows_the_gpt_and_not_the_tokenizers_square(model_folders: Path, pipeline: TextToImage) -> None:
    config = load_model(model_folders / "gpt", GPTConfig, GPT).config
    wide = config.model_copy(update={"layout": config.layout.model_copy(update={"grid_height": 2, "grid_width": 5})})
    pipeline.gpt = GPT(wide).eval()
    assert pipeline.generate(PROMPTS[:1])[0].image_HW3.shape == (8, 20, 3)
