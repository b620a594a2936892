"""minDALL-E, ruDALL-E, CogView and CLIP-GEN: what the published ones gave, and ours in their layouts and back."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vqt2i import TextToImage
from vqt2i.checkpoint import load_model, save_model
from vqt2i.cli import main
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import GPT, GPTConfig, HeadConfig, LayoutConfig, VectorCondition, Vectors
from vqt2i.nn.sparsity import RowColumnConfig
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.peers import FAMILIES, Options
from vqt2i.peers.cogview import NORM_EPS, as_ours, parts_of, their_ids
from vqt2i.peers.convert import import_checkpoint
from vqt2i.text import load_tokenizer
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import VQConfig

GREEDY, DRAWN = SamplingConfig(guidance=1.0, top_k=1), SamplingConfig(guidance=1.0)
# of youtokentome: ▁ a b c, ab, ▁c; unknown 1, padding 0, begin 2, end 3
YTTM = "4 2\n9601 4\n97 5\n98 6\n99 7\n5 6 8\n4 7 9\n1 0 2 3\n"
N_IDS, N_TEXT, S = 12, 10, 7
TRANSFORMER = TransformerConfig(
    width=32, n_layers=3, n_heads=2, mlp_width=48, norm="layer", norm_eps=1e-5, mlp="gelu", bias=True, qk_norm=False
)
SANDWICH = TRANSFORMER.model_copy(update={"norm_placement": "sandwich", "mlp": "gelu_tanh"})
LAYOUT = LayoutConfig(n_image_ids=N_IDS, grid_height=8, grid_width=8)
TEXT_LAYOUT = LAYOUT.model_copy(update={"n_text_ids": N_TEXT, "text_length": S})
BARE = TEXT_LAYOUT.model_copy(update={"padding": "bare"})
PARTS = {"image_tokenizer": "v", "text_tokenizer": "t"}
GPTS = {
    "mindalle-gpt": GPTConfig(transformer=TRANSFORMER, layout=BARE, positions="raster", **PARTS),
    "rudalle-gpt": GPTConfig(
        transformer=SANDWICH.model_copy(update={"pb_relax": True}), layout=BARE, positions="learned", **PARTS,
        sparsity=RowColumnConfig(conv_wraps=False), head=HeadConfig(norm=True, bias=True),
    ),
    "cogview-gpt": GPTConfig(
        transformer=SANDWICH.model_copy(update={"norm": "scaled_layer", "norm_eps": NORM_EPS}), layout=TEXT_LAYOUT,
        positions="sequence", **PARTS,
    ),
    "clip-gen-gpt": GPTConfig(
        transformer=TRANSFORMER, layout=LAYOUT, condition=VectorCondition(width=6, encoder="c"), positions="sequence",
        head=HeadConfig(bias=True), image_tokenizer="v",
    ),
}  # fmt: skip
TAMING = {
    "architecture": "taming", "image_size_px": 16, "downsample": 2, "patch_px": 1, "channels": (64, 32),
    "stem_channels": 32, "latent_channels": 12, "attention_sizes_px": (8,),
}  # fmt: skip
CODES = {"codebook_size": N_IDS, "code_dim": 6, "l2_normalised": False, "restart_below": 0}
VQS = {
    "mindalle-vq": ImageTokenizerConfig(
        **TAMING, quantizer=VQConfig(**CODES, update="gradient", codebook_weight=0.25, commitment_weight=1.0)
    ),
    "cogview-vq": ImageTokenizerConfig(
        architecture="strided", image_size_px=64, downsample=8, patch_px=2, channels=(8, 12, 16), latent_channels=6,
        n_res_blocks=0, quantizer=VQConfig(**CODES, usage_decay=0.99),
    ),
    "clip-gen-vq": ImageTokenizerConfig(
        **TAMING, norm_eps=1e-5, quantizer=VQConfig(**CODES, update="gradient", codebook_weight=1.0)
    ),
}  # fmt: skip


@pytest.fixture
def vq(tmp_path: Path, randomised) -> Path:
    """The folder of an image tokenizer for the GPTs: 8 x 8 of its ids."""
    config = VQS["mindalle-vq"]
    save_model(tmp_path / "vq", randomised(ImageTokenizer(config)), config, {"kind": "vqgan"})
    return tmp_path / "vq"


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    (tmp_path / "bpe.model").write_text(YTTM)
    return tmp_path / "bpe.model"


@pytest.fixture
def characters(tmp_path: Path) -> Path:
    """A tokenizer like minDALL-E's, with [PAD] as its last id but one."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "a</w>": 3, "b</w>": 4, "ab</w>": 5, "c</w>": 6, "[PAD]": 7, "c": 8}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "bpe-vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer" / "bpe-merges.txt").write_text("#version: 0.2\na b</w>\n")
    return tmp_path / "tokenizer"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "card.json").write_text(json.dumps({"kind": "clip", "fingerprint": "c"}))
    return tmp_path / "clip"


def compared(family: str, folder: Path, path: Path, io: str, options: Options) -> set[str]:
    """What of a published model agrees; `--check` refuses all else."""
    recorded = load_file(io)
    importer = FAMILIES[family]
    importer = importer.of(importer.read(path), options)
    import_checkpoint(FAMILIES[family], path, folder, options, check=Path(io))
    model = load_model(
        folder, *((GPTConfig, GPT) if importer.kind == "gpt" else (ImageTokenizerConfig, ImageTokenizer))
    )
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
    text, image_1I = parts_of(gpt, recorded["gen_tokens"].tolist())
    greedy(tmp_path / "g", [tuple(text.ids_BS[0].tolist())], image_1I)


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
def test_an_image_tokenizer_of_ours_in_that_layout_comes_back(save_native, randomised, tmp_path: Path, name) -> None:
    model = randomised(ImageTokenizer(VQS[name]))
    if name == "cogview-vq":  # what theirs has no place for
        width = model.config.latent_width
        model.quantizer.from_code.weight.data = torch.eye(width)[..., None, None]
        model.quantizer.from_code.bias.data.zero_()
        model.encoder.pixel_mean.copy_(2 * torch.tensor([0.79093, 0.76271, 0.75340]) - 1)
        model.encoder.pixel_std.copy_(2 * torch.tensor([0.30379, 0.32279, 0.32800]))
    key = {"cogview-vq": "module", "clip-gen-vq": "model"}.get(name, "state_dict")
    path = save_native(tmp_path / "x.pt", name, model, key)
    import_checkpoint(FAMILIES[name], path, tmp_path / "m", Options(image_size_px=model.config.image_size_px))
    found = load_model(tmp_path / "m", ImageTokenizerConfig, ImageTokenizer)
    assert found.config == model.config
    ids_BHW = torch.randint(N_IDS, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.decode(ids_BHW), model.decode(ids_BHW))
    pictures = model.decode(ids_BHW)
    assert torch.equal(found.encode(pictures), model.encode(pictures)) and len(model.encode(pictures).unique()) > 3


def as_theirs(model: GPT, name: str) -> GPT:
    """What theirs ties, tied."""
    layout, rows = model.layout, model.embedding.weight.data
    if name == "mindalle-gpt":
        rows[layout.first_learned_pad :] = rows[7]  # [PAD]
    if name == "cogview-gpt":
        model.head.weight.data = rows[: layout.n_targets].clone()
        rows[layout.i2t], rows[layout.bot] = rows[layout.boi], rows[layout.t2i]
    if name == "clip-gen-gpt":
        model.reader.null_vectors.data.zero_()
        model.position_embeddings[0].weight.data[-1] = 0
    elif name != "cogview-gpt":
        for table in model.position_embeddings:
            table.weight.data[0] = 0
    return model


@pytest.fixture
def options(tmp_path: Path, vq: Path, bpe: Path, characters: Path, clip: Path) -> dict[str, Options]:
    heads = {"num_attention_heads": 2, "n_head": 2, "txt_num_tokens": N_TEXT}
    (tmp_path / "arguments.json").write_text(json.dumps(heads))
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump({"stage2": {"hparams": {"n_heads": 2}}}))
    settings = tmp_path / "arguments.json"
    return {
        "mindalle-gpt": Options(settings=tmp_path / "arguments.yaml", vq=vq),
        "rudalle-gpt": Options(settings=settings, vq=vq, text=bpe),
        "cogview-gpt": Options(settings=settings, vq=vq, text=bpe),
        "clip-gen-gpt": Options(settings=settings, vq=vq, text_encoder=clip),
    }


@pytest.fixture
def importable(save_native, randomised, options, tmp_path: Path):
    """A function that writes one of `GPTS` as a checkpoint of its family and imports it; returns it and the folder."""

    def make(name: str) -> tuple[GPT, Path]:
        model = as_theirs(randomised(GPT(GPTS[name])), name)
        path = save_native(tmp_path / "x.pt", name, model, "module")
        import_checkpoint(FAMILIES[name], path, tmp_path / name, options[name])
        return model, tmp_path / name

    return make


def conditions_of(gpt: GPT) -> list:
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


def test_their_ids_of_cogview_are_ours_mark_by_mark() -> None:
    gpt = GPT(GPTS["cogview-gpt"])
    scored, marks = their_ids(gpt.config)
    mark = N_IDS + N_TEXT
    assert scored == [*range(N_IDS, mark), mark + 14, *range(N_IDS)]
    assert marks == [mark, mark + 7, mark + 1, mark + 1, mark + 7]
    theirs = [mark + 7, N_IDS + 3, N_IDS + 4, mark + 14, mark + 1, *[5] * 64]
    ours = as_ours(gpt, theirs).ids_BL[0].tolist()
    assert [([*scored, *marks])[i] for i in ours] == theirs


def test_what_the_weights_do_not_tell_is_asked_for(save_native, fails, tmp_path: Path, vq, bpe, options) -> None:
    def refused(name: str, *more: object) -> str:
        path = save_native(tmp_path / "x.pt", name, GPT(GPTS[name]), "module")
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
    (tmp_path / "arguments.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 64}))
    assert "hidden_size is 32 in the weights, 64 in" in refused("rudalle-gpt", *with_vq, "--text", bpe)
    (tmp_path / "arguments.json").write_text(json.dumps({"num_attention_heads": 2, "mlp_activation": "relu"}))
    assert "mlp_activation: 'relu'; expected 'gelu_jit'" in refused("rudalle-gpt", *with_vq, "--text", bpe)
    (tmp_path / "arguments.json").write_text(json.dumps({"num_attention_heads": 2}))
    (tmp_path / "bpe.model").write_text(YTTM.replace("4 7 9", "4 7 99"))
    assert "has 100 ids" in refused("rudalle-gpt", *with_vq, "--text", bpe)


def test_masks_of_another_model_are_refused(save_native, fails, tmp_path: Path, vq, bpe, options) -> None:
    path = save_native(tmp_path / "x.pt", "rudalle-gpt", GPT(GPTS["rudalle-gpt"]), "module")
    state = torch.load(path)["module"]
    torch.save({"module": state | {"transformer.row_mask": torch.ones(71, 71).bool()}}, path)
    told = fails("import_checkpoint", "rudalle-gpt", path, "--out", tmp_path / "out", "--vq", vq, "--text", bpe,
                 "--settings", tmp_path / "arguments.json")  # fmt: skip
    assert "its masks (row_mask, col_mask, conv_mask) over 3 layers are not those of a published ruDALL-E" in told
