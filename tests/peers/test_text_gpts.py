"""minDALL-E, ruDALL-E, CogView and CLIP-GEN: what the published ones gave, and ours in their layouts and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vqt2i import TextToImage
from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.cli import main
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.find import open_pipeline
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.rerank import likelihood_scores
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import (
    GPT,
    GPTConfig,
    LowResolution,
    LowResolutionBatch,
    Vectors,
    caption_log_probability,
)
from vqt2i.peers import FAMILIES, Options
from vqt2i.peers.cogview import EMBEDDINGS, MARKS, POSITIONS, as_ours, parts_of, split_of, their_ids
from vqt2i.peers.convert import import_checkpoint
from vqt2i.peers.gpts import image_logits
from vqt2i.peers.reading import read_checkpoint
from vqt2i.text import load_tokenizer, pad_texts
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import VQConfig

GREEDY, DRAWN = SamplingConfig(guidance=1.0, top_k=1), SamplingConfig(guidance=1.0)
N_IDS, N_TEXT = 12, 10  # of the models here
VQS = ("mindalle-vq", "cogview-vq", "clip-gen-vq")
COGVIEWS = ("cogview-gpt", "cogview-caption", "cogview-sr")
GPTS = ("mindalle-gpt", "rudalle-gpt", *COGVIEWS, "clip-gen-gpt")


def compared(family: str, folder: Path, path: Path, io: str, options: Options) -> set[str]:
    """What of a published model agrees; `--check` refuses all else."""
    recorded = load_file(io)
    importer = FAMILIES[family]
    importer = importer.of(importer.read(path), options)
    import_checkpoint(FAMILIES[family], path, folder, options, check=Path(io))
    classes = (ImageTokenizerConfig, ImageTokenizer) if importer.kind == "vqgan" else (GPTConfig, GPT)
    model = load_model(folder, *classes)
    found = list(importer.compare(model, recorded))
    assert all(one.agrees and one.allowed <= 1e-4 for one in found)
    return {one.name for one in found}


def greedy(folder: Path, conditions: list, expected: torch.Tensor) -> None:
    """Cached steps draw what was recorded, alone and side by side, natively where the heads have such a width."""
    gpt = load_model(folder, GPTConfig, GPT)
    jobs = [Job(condition, i, 0) for i, condition in enumerate(conditions)]
    assert torch.equal(decode_image_ids(gpt, jobs, GREEDY, 0).flatten(1), expected)


# ---- published -------------------------------------------------------------------------------------------------------


def test_mindalle_as_published(published, tmp_path: Path) -> None:
    folder, vq = published("mindalle"), tmp_path / "v"
    io = folder / "io.safetensors"
    stage1 = compared("mindalle-vq", vq, folder / "stage1_last.ckpt", io, Options())
    assert stage1 == {"z", "indices", "rec", "gen_decoded", "gen_pixels"}
    stage2 = compared("mindalle-gpt", tmp_path / "g", folder / "stage2_last.ckpt", io, Options(vq=vq))
    assert stage2 == {"tf_logits_txt", "tf_logits_img", "gen_logits", "gen_codes"}
    tokenizer, texts = load_tokenizer(tmp_path / "g"), json.loads((folder / "texts.json").read_text())
    ids = [tokenizer.encode(row["text"]) for row in texts]
    for found, row in zip(ids, texts, strict=True):
        assert [*found, *[99] * 16][:16] == row["ids"]
    greedy(tmp_path / "g", [tuple(row[:16]) for row in ids], load_file(io)["gen_codes"])


def test_rudalle_as_published(published, tmp_path: Path, bpe: Path) -> None:
    folder = published("rudalle")
    config = ImageTokenizerConfig(
        image_size_px=16, downsample=2, channels=(8,), quantizer=VQConfig(codebook_size=48, code_dim=4)
    )
    save_model(tmp_path / "v", ImageTokenizer(config), config, {"kind": "vqgan"})
    options, io = Options(vq=tmp_path / "v", text=bpe), folder / "io.safetensors"
    found = compared("rudalle-gpt", tmp_path / "g", folder / "pytorch_model.bin", io, options)
    assert found == {"tf_logits of text", "tf_logits of image", "gen_logits", "gen_codes"}
    recorded = load_file(io)
    texts = [tuple(i for i in row if i) for row in recorded["input_ids"][:, :12].tolist()]
    greedy(tmp_path / "g", texts, recorded["gen_codes"])
    gpt, side = load_model(tmp_path / "g", GPTConfig, GPT), slice(12, None)
    for name, mask in (("row", "row_mask"), ("column", "col_mask"), ("conv", "conv_mask")):
        visible = torch.from_numpy(gpt.config.sparsity.visible(name, 8, 8))
        assert torch.equal(visible, recorded[mask][side, side])


def test_cogview_as_published(published, tmp_path: Path, bpe: Path) -> None:
    folder, vq = published("cogview"), tmp_path / "v"
    names = compared("cogview-vq", vq, folder / "vqvae.pt", folder / "vqvae_io.safetensors", Options(image_size_px=64))
    assert names == {"z", "indices", "rec"}
    options, io = Options(vq=vq, text=bpe, settings=folder / "config.json"), folder / "io.safetensors"
    names = compared("cogview-gpt", tmp_path / "g", folder / "cogview-tiny", io, options)
    assert names == {"tf_logits", "tf_logits_sep5_row0", "gen_logits", "gen_tokens"}
    gpt, recorded = load_model(tmp_path / "g", GPTConfig, GPT), load_file(io)
    text, image_1I = parts_of(gpt, recorded["gen_tokens"].tolist(), 64)
    greedy(tmp_path / "g", [tuple(text.ids_BS[0].tolist())], image_1I)
    sr = tmp_path / "sr"
    assert compared("cogview-sr", sr, folder / "cogview-tiny", io, options) == {"roi2_logits", "roi2_tokens"}
    text, low_1M = parts_of(gpt, recorded["roi2_tokens"].tolist(), 16)
    condition = LowResolution(tuple(text.ids_BS[0].tolist()), tuple(low_1M[0].tolist()))
    drawn = decode_image_ids(load_model(sr, GPTConfig, GPT), [Job(condition, 0, 0)], GREEDY, 0).flatten()
    assert drawn[:32].tolist() == recorded["roi2_tokens"][-32:].tolist()
    names = compared("cogview-caption", tmp_path / "c", folder / "cogview-tiny", io, options)
    assert names == {"tf_logits", "tf_logits_sep5_row0", "gen_logits", "gen_tokens"}


def test_a_published_cogview_in_parts_is_the_whole_one(published, tmp_path: Path, bpe: Path) -> None:
    folder = published("cogview")
    import_checkpoint(FAMILIES["cogview-vq"], folder / "vqvae.pt", tmp_path / "v", Options(image_size_px=64))
    whole = dict(read_checkpoint(next(folder.rglob("mp_rank_00*"))).tensors)
    for n_parts in (2, 4):
        for rank in range(n_parts):
            state = {name: part_of(value, name, rank, n_parts) for name, value in whole.items()}
            save_part(tmp_path / str(n_parts), rank, state)
    options = Options(vq=tmp_path / "v", text=bpe, settings=folder / "config.json")
    found = {
        import_checkpoint(FAMILIES["cogview-gpt"], path, tmp_path / f"g{n}", options)
        for n, path in enumerate((folder / "cogview-tiny", tmp_path / "2", tmp_path / "4"))
    }
    assert len(found) == 1


def test_cogview_reads_texts_as_published(published) -> None:
    folder = published("cogview")
    texts = json.loads((folder / "sp_texts.json").read_text())["texts"]
    tokenizer = load_tokenizer(folder / "cog-pretrain.model")
    assert len(texts) == 20 and tokenizer.n_ids == 50000
    assert [tokenizer.encode(row["text"]) for row in texts] == [row["sp_ids"] for row in texts]


def test_clip_gen_as_published(published, tmp_path: Path, clip: Path) -> None:
    folder, vq = published("clip-gen"), tmp_path / "v"
    io = folder / "vqgan_io.safetensors"
    names = compared("clip-gen-vq", vq, folder / "vqgan_coco.pt", io, Options(image_size_px=16))
    assert names == {"z", "indices", "rec"}
    io = folder / "gpt_io.safetensors"
    names = compared("clip-gen-gpt", tmp_path / "g", folder / "gpt_coco.pt", io, Options(vq=vq, text_encoder=clip))
    assert names == {"tf_logits", "gen_logits", "gen_codes"}
    recorded = load_file(io)
    greedy(tmp_path / "g", [Vectors(1, row.numpy().tobytes()) for row in recorded["cond"]], recorded["gen_codes"])


# ---- ours in their layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VQS)
def test_an_image_tokenizer_of_ours_in_that_layout_comes_back(native, tmp_path: Path, name: str) -> None:
    made = native(name)
    import_checkpoint(FAMILIES[name], made.path, tmp_path / "m", made.options)
    found = load_model(tmp_path / "m", ImageTokenizerConfig, ImageTokenizer)
    assert found.config == made.model.config
    ids_BHW = torch.randint(N_IDS, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.decode(ids_BHW), made.model.decode(ids_BHW))
    pictures = made.model.decode(ids_BHW)
    expected = made.model.encode(pictures)
    assert torch.equal(found.encode(pictures), expected) and len(expected.unique()) > 3


@pytest.fixture
def importable(native, tmp_path: Path):
    """A function that writes a model of ours as a checkpoint of its family and imports it; gives it and the folder."""

    def make(name: str) -> tuple[GPT, Path]:
        made = native(name)
        import_checkpoint(FAMILIES[name], made.path, tmp_path / name, made.options)
        return made.model, tmp_path / name

    return make


def conditions_of(gpt: GPT) -> list:
    if gpt.layout.is_upscaling:
        return [LowResolution(text, tuple(n % N_IDS for n in range(k, k + 16))) for k, text in enumerate(((1, 2), ()))]
    if gpt.layout.reads_text:
        return [(1, 2, 5), (3,), ()]
    return [Vectors(1, torch.full((6,), x).numpy().tobytes()) for x in (0.5, -0.3)]


@pytest.mark.parametrize("name", GPTS)
def test_a_gpt_of_ours_in_that_layout_comes_back_and_is_drawn_from_natively(importable, name: str) -> None:
    model, folder = importable(name)
    found = load_model(folder, GPTConfig, GPT)
    parts = ("text_tokenizer", "image_tokenizer", "condition")
    assert found.config == model.config.model_copy(update={part: getattr(found.config, part) for part in parts})
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    jobs = [Job(condition, i, 0) for i, condition in enumerate(conditions_of(found))]
    expected = decode_image_ids(model, jobs, DRAWN, 0)
    assert torch.equal(decode_image_ids(NativeGPT(found, "fp32"), jobs, DRAWN, 0), expected)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("name", ["mindalle-gpt", "rudalle-gpt", "cogview-gpt"])
def test_a_prompt_becomes_a_picture_by_the_tokenizer_in_the_gpts_folder(importable, in_empty_folder, name) -> None:
    _, folder = importable(name)
    assert main(["generate", "ab c", "--model", str(folder), "--n", "1", "--out", "drawn"]) == 0
    assert main(["make_pipeline", "--model", str(folder), "--out", "pipeline"]) == 0
    pipeline = TextToImage.load("pipeline", "cpu")
    encoded = {"mindalle-gpt": [5, 6]}.get(name, [2, 4, 8, 9, 3])
    assert pipeline.text.encode("ab c") == encoded
    conditions = [pipeline._reader.condition(prompt) for prompt in ("ab c", "b")]
    assert conditions[0] == tuple(encoded)
    with torch.inference_mode():
        reader = pipeline.gpt.reader
        logits, other = (pipeline.gpt.prefill(reader(reader.collate([c], pipeline.gpt.device)))[0] for c in conditions)
    assert (logits - other).abs().max() > 1e-3


# ---- CogView: its sequences, its marks, its parts --------------------------------------------------------------------


def test_their_ids_of_cogview_are_ours_mark_by_mark(build) -> None:
    gpt, mark = build("cogview-gpt"), N_IDS + N_TEXT
    scored, marks = their_ids(gpt.config)
    assert scored == [*range(N_IDS, mark), mark + 14, *range(N_IDS)]
    assert marks == [mark, mark + 7, mark + 4, mark + 1, mark + 7]
    assert their_ids(build("cogview-sr").config) == (scored, [*marks, mark + 8, mark + 18, mark + 2])
    theirs = [mark + 7, N_IDS + 3, N_IDS + 4, mark + 14, mark + 1, *[5] * 64, mark + 4]
    ours = as_ours(gpt, theirs).ids_BL[0].tolist()
    assert [([*scored, *marks])[i] for i in ours] == theirs


def scores_there(weights: dict[str, Tensor], gpt: GPT, ids: list[int], positions: list[int] | None = None) -> Tensor:
    """Logits of all their ids after each of these: one matrix for embeddings and head, one table of positions."""
    positions = list(range(len(ids))) if positions is None else positions
    x_1LD = (weights[EMBEDDINGS][ids] + weights[POSITIONS][positions])[None]
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
    return (gpt.transformer(x_1LD, mask_B1LK=mask) @ weights[EMBEDDINGS].T)[0]


@torch.inference_mode()
def test_the_orders_of_cogview_are_those_of_its_code(native) -> None:
    made = native("cogview-caption")
    gpt, weights = made.model, made.weights
    mark = {name: N_IDS + N_TEXT + i for i, name in enumerate(MARKS)}
    image = torch.arange(64) * 7 % N_IDS
    text, words = pad_texts([[3, 1, 4]], 7), [N_IDS + i for i in (3, 1, 4)]
    forth = [mark["ROI1"], *words, mark["TINY"], mark["BOI1"], *image.tolist()]
    log_p = scores_there(weights, gpt, forth)[5:-1, :N_IDS].log_softmax(-1)
    expected = log_p.gather(1, image[:, None]).sum()
    torch.testing.assert_close(64 * likelihood_scores(gpt, image[None], [(3, 1, 4)])[0], expected)
    back = [mark["TINY"], mark["BOI1"], *image.tolist(), mark["EOI1"], mark["ROI1"], *words]
    of_texts = [*range(N_IDS, N_IDS + N_TEXT), mark["TINY"]]
    log_p = scores_there(weights, gpt, back)[67:-1, of_texts].log_softmax(-1)
    expected = log_p.gather(1, torch.tensor([[3], [1], [4]])).mean()
    torch.testing.assert_close(caption_log_probability(gpt, text, image[None])[0], expected)


@torch.inference_mode()
def test_the_second_image_of_cogview_is_that_of_its_code(native) -> None:
    made = native("cogview-sr")
    mark = {name: N_IDS + N_TEXT + i for i, name in enumerate(MARKS)}
    low, image = torch.arange(16) * 5 % N_IDS, torch.arange(64) * 7 % N_IDS
    words = [N_IDS + i for i in (3, 1, 4)]
    first = [mark["ROI1"], *words, mark["TINY"], mark["BOI1"], *low.tolist(), mark["EOI1"], mark["ROI2"]]
    second = [mark["POS0"], mark["TINY"], mark["BOI2"], *image.tolist()]
    positions = [*range(len(first)), *range(1, len(second) + 1)]
    expected = scores_there(made.weights, made.model, first + second, positions)[-65:-1, :N_IDS]
    condition = LowResolutionBatch(pad_texts([[3, 1, 4]], 7), low[None])
    torch.testing.assert_close(image_logits(made.model, condition, image[None])[0], expected)


def test_a_cogview_for_captions_says_what_is_in_a_picture_and_ranks_pictures(
    importable, in_empty_folder: Path, capsys
) -> None:
    _, folder = importable("cogview-caption")
    assert main(["generate", "ab c", "--model", str(folder), "--rerank", "2", "--n", "1", "--out", "drawn"]) == 0
    picture = next(in_empty_folder.glob("drawn/*.png"))
    capsys.readouterr()
    assert main(["caption", str(picture), "--model", str(folder), "--ids", "3", "--beams", "2"]) == 0
    said = capsys.readouterr().out
    pipeline = open_pipeline(str(folder), in_empty_folder / "runs", "cpu")
    drawn = pipeline.generate("ab c", n=1, rerank=2)[0]
    expected = caption_log_probability(
        pipeline.gpt, pad_texts([[2, 4, 8, 9, 3]], 7), torch.from_numpy(drawn.image_ids_HW).flatten()[None]
    )
    assert drawn.scores["caption"] == pytest.approx(float(expected), rel=1e-4)
    assert str(picture) in said and len(said.strip().splitlines()) == 2


def test_a_cogview_for_pictures_captions_none_and_does_not_rank_by_captions(
    importable, in_empty_folder: Path, fails
) -> None:
    _, folder = importable("cogview-gpt")
    assert main(["generate", "ab c", "--model", str(folder), "--n", "1", "--out", "drawn"]) == 0
    picture = next(in_empty_folder.glob("drawn/*.png"))
    assert "never saw a text behind an image and cannot caption" in fails("caption", picture, "--model", folder)
    again = ("generate", "ab c", "--model", folder, "--rerank", "2", "--out", "again")
    assert "predicts no text from an image; use the scorer 'clip'" in fails(*again, "--scorer", "caption")
    assert "this pipeline has no CLIP; train one with tools/train_clip.py and give it by --clip" in fails(*again)


def test_a_cogview_for_super_resolution_draws_a_picture_larger(native, in_empty_folder: Path) -> None:
    made, folder = native("cogview-sr"), in_empty_folder / "sr"
    arguments = ["import_checkpoint", "cogview-sr", made.path, "--out", folder, *made.arguments]
    assert main([str(part) for part in arguments]) == 0
    card = read_card(folder)
    assert card["kind"] == "upscaler" and card["sampling"]["top_k"] == 200
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save("small.png")
    assert main(["upscale", "small.png", "--prompt", "ab c", "--model", str(folder), "--out", "large"]) == 0
    drawn = next(path for path in Path("large").glob("*.png") if path.name != "before-after.png")
    assert Image.open(drawn).size == (48, 32)


def part_of(value: Tensor, name: str, rank: int, n_parts: int) -> Tensor:
    """What one of so many devices holds, by the rule of Megatron-LM's layers: matrices are cut into pieces, of which
    each device gets every `n_parts`th; three for each device where queries, keys and values lie in one matrix."""
    *_, module, kind = name.split(".")
    n_pieces, axis = {
        "word_embeddings": (1, 0), "query_key_value": (3, 0), "dense_h_to_4h": (1, 0), "dense": (1, 1),
        "dense_4h_to_h": (1, 1),
    }.get(module, (0, 0))  # fmt: skip
    if not n_pieces or (axis == 1 and kind == "bias"):
        return value.clone()
    pieces = torch.split(value, value.shape[axis] // n_parts // n_pieces, dim=axis)
    return torch.cat(pieces[rank::n_parts], dim=axis)


def save_part(folder: Path, rank: int, state: dict[str, Tensor], step: str = "7") -> Path:
    path = folder / step / f"mp_rank_{rank:02d}_model_states.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": state, "iteration": 7}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text(step)
    return path


@pytest.fixture
def in_parts(native, tmp_path: Path):
    """A function that writes a CogView in parts, beside another of an earlier step; gives it and the folder."""

    def make(name: str, n_parts: int):
        made = native(name)
        # as many ids as that many devices need: a multiple of 128 for each
        rows = torch.nn.functional.pad(made.weights[EMBEDDINGS], (0, 0, 0, 128 * (n_parts - 1)))
        made.save(made.weights | {EMBEDDINGS: rows})
        for rank in range(n_parts):
            save_part(tmp_path / "parts", rank, {k: torch.zeros_like(v) for k, v in made.weights.items()}, "3")
            state = {k: part_of(value, k, rank, n_parts) for k, value in made.weights.items()}
            save_part(tmp_path / "parts", rank, state)
        return made, tmp_path / "parts"

    return make


@pytest.mark.parametrize("name", COGVIEWS)
def test_a_cogview_in_parts_is_the_whole_one(in_parts, tmp_path: Path, name: str) -> None:
    made, folder = in_parts(name, 2)
    assert {key for key in made.weights if split_of(key)} == {
        key for key, value in made.weights.items() if part_of(value, key, 0, 2).shape != value.shape
    }
    whole = import_checkpoint(FAMILIES[name], made.path, tmp_path / "whole", made.options)
    assert import_checkpoint(FAMILIES[name], folder, tmp_path / "joined", made.options) == whole
    parts = read_card(tmp_path / "joined")["source"]["parts"]
    assert [part["file"] for part in parts] == [f"mp_rank_0{rank}_model_states.pt" for rank in (0, 1)]
    assert len({part["sha256"] for part in parts}) == 2
    (folder / "latest_checkpointed_iteration.txt").unlink()
    assert import_checkpoint(FAMILIES[name], folder / "7", tmp_path / "again", made.options) == whole


def test_parts_that_are_missing_or_do_not_belong_together_are_told(in_parts, fails, tmp_path: Path) -> None:
    made, folder = in_parts("cogview-gpt", 2)
    first, second = (folder / "7" / f"mp_rank_0{rank}_model_states.pt" for rank in (0, 1))
    content = second.read_bytes()

    def refused(path: Path) -> str:
        told = fails("import_checkpoint", "cogview-gpt", path, "--out", tmp_path / "out", *made.arguments)
        assert not (tmp_path / "out").exists()
        return told

    assert "one of 2 parts of a model; give the folder with all of them" in refused(first)
    (folder / "latest_checkpointed_iteration.txt").rename(folder / "kept")
    assert "found 2 folders of parts" in refused(folder)
    (folder / "kept").rename(folder / "latest_checkpointed_iteration.txt")
    state = torch.load(second)["module"]
    for change, told in (
        ({"transformer.final_layernorm.bias": torch.ones(32)}, "transformer.final_layernorm.bias is another than in"),
        ({EMBEDDINGS: torch.ones(5, 32)}, f"{EMBEDDINGS} is another than in mp_rank_00_model_states.pt"),
        ({"more": torch.ones(1)}, "more is only in one of it and mp_rank_00_model_states.pt"),
    ):
        save_part(folder, 1, state | change)
        assert told in refused(folder)
    second.write_bytes(content[: len(content) // 2])
    assert "mp_rank_01_model_states.pt: damaged" in refused(folder)
    second.rename(second.with_name("mp_rank_02_model_states.pt"))
    assert "lacks mp_rank_01_model_states.pt of 3 parts" in refused(folder)
    assert "found 0 folders of parts" in refused(tmp_path / "native")


# ---- what nothing tells ----------------------------------------------------------------------------------------------


def test_what_the_weights_do_not_tell_is_asked_for(save_native, build, fails, tmp_path: Path, vq, bpe) -> None:
    (tmp_path / "arguments.json").write_text(json.dumps({"num_attention_heads": 2, "n_head": 2}))
    (tmp_path / "tokenizer").mkdir()
    vocabulary = {"[UNK]": 0, "a": 1, "a</w>": 2, "[PAD]": 3}
    (tmp_path / "tokenizer" / "bpe-vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer" / "bpe-merges.txt").write_text("#version: 0.2\n")

    def refused(name: str, *more: object) -> str:
        path = save_native(tmp_path / "x.pt", name, build(name), "module")
        told = fails("import_checkpoint", name, path, "--out", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return told

    settings = ("--settings", tmp_path / "arguments.json")
    with_vq = (*settings, "--vq", vq)
    assert "no published size" in refused("rudalle-gpt", "--vq", vq)
    assert "import that one first (taming-gumbel)" in refused("rudalle-gpt", *settings)
    assert "its text tokenizer is published beside it; give that file by --text" in refused("rudalle-gpt", *with_vq)
    assert "reads embeddings by CLIP ViT-B/32" in refused("clip-gen-gpt", *with_vq)
    assert "which is not the published model's" in refused("mindalle-gpt", "--vq", vq)
    (tmp_path / "tokenizer" / "bpe-merges.txt").write_text("#version: 0.2\na a</w>\n")
    assert "merges a and a</w>, but aa</w> is not in the vocabulary" in refused("mindalle-gpt", "--vq", vq)
    (tmp_path / "arguments.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 64}))
    assert "hidden_size is 32 in the weights, 64 in" in refused("rudalle-gpt", *with_vq, "--text", bpe)
    (tmp_path / "arguments.json").write_text(json.dumps({"num_attention_heads": 2, "mlp_activation": "relu"}))
    assert "mlp_activation: 'relu'; expected 'gelu_jit'" in refused("rudalle-gpt", *with_vq, "--text", bpe)
    (tmp_path / "arguments.json").write_text(json.dumps({"num_attention_heads": 2}))
    bpe.write_text(bpe.read_text().replace("4 7 9", "4 7 99"))
    assert "has 100 ids" in refused("rudalle-gpt", *with_vq, "--text", bpe)


def test_masks_of_another_model_are_refused(native, fails, tmp_path: Path) -> None:
    made = native("rudalle-gpt")
    made.save(made.weights | {"transformer.row_mask": torch.ones(71, 71).bool()})
    told = fails("import_checkpoint", "rudalle-gpt", made.path, "--out", tmp_path / "out", *made.arguments)
    assert "its masks (row_mask, col_mask, conv_mask) over 3 layers are not those of a published ruDALL-E" in told
