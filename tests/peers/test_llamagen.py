import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from vqt2i import TextToImage
from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.cli import main
from vqt2i.data.shards import DataSet
from vqt2i.generation.decode import Job, decode_image_ids
from vqt2i.generation.native import NativeGPT
from vqt2i.generation.sampling import SamplingConfig
from vqt2i.gpt import (
    GPT,
    FeatureCondition,
    GPTConfig,
    LabelCondition,
    LayoutConfig,
    LinearProjection,
    LossWeights,
    MLPProjection,
    Vectors,
    gpt_loss,
)
from vqt2i.nn.transformer import TransformerConfig
from vqt2i.peers import FAMILIES, Options
from vqt2i.peers.convert import import_checkpoint
from vqt2i.peers.llamagen import image_logits, pairs_apart, pairs_together
from vqt2i.text import pad_texts
from vqt2i.text.cleaning import clean_web_caption
from vqt2i.text.encoder import TextEncoder, fingerprint_of
from vqt2i.training.batches import Batch
from vqt2i.training.conditions import CaptionFeatures, Conditioner
from vqt2i.vq import ImageTokenizer, ImageTokenizerConfig
from vqt2i.vq.quantizer import VQConfig

VQ, C2I, T2I = "llamagen-vq", "llamagen-gpt-c2i", "llamagen-gpt-t2i"
N_IDS, WIDTH = 20, 12  # the width of the features is that of `tiny_t5`
VQ_CONFIG = ImageTokenizerConfig(
    image_size_px=16, downsample=4, architecture="taming", patch_px=1, channels=(64, 32, 96), stem_channels=32,
    latent_channels=12, n_res_blocks=2, attention_sizes_px=(4,),
    quantizer=VQConfig(codebook_size=N_IDS, code_dim=4, update="gradient", codebook_weight=1.0, restart_below=0),
)  # fmt: skip
CONDITIONS = {
    C2I: LabelCondition(n_labels=3),
    T2I: FeatureCondition(
        n_vectors=6, width=WIDTH, projection=MLPProjection(width=32, bias=False), cleaning="web", encoder="t"
    ),
}


def gpt_config(name: str, vq: str = "v", encoder: str = "t") -> GPTConfig:
    condition = CONDITIONS[name]
    if name == T2I:
        condition = condition.model_copy(update={"encoder": encoder})
    transformer = TransformerConfig(width=32, n_layers=2, n_heads=2, mlp_width=48, norm_eps=1e-5, qk_norm=False)
    layout = LayoutConfig(n_image_ids=N_IDS, grid_height=4, grid_width=4)
    return GPTConfig(
        transformer=transformer, layout=layout, condition=condition, positions="rotary_image", image_tokenizer=vq
    )


@pytest.fixture
def vq(tmp_path: Path, randomised) -> Path:
    """The folder of an image tokenizer for the GPTs."""
    save_model(tmp_path / "vq", randomised(ImageTokenizer(VQ_CONFIG)), VQ_CONFIG, {"kind": "vqgan"})
    return tmp_path / "vq"


@pytest.fixture
def arguments(tmp_path: Path) -> Path:
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({"n_head": 2}))
    return path


def import_published(folder: Path, name: str, out: Path, **options: object) -> None:
    import_checkpoint(FAMILIES[name], next(folder.glob("*.pt")), out, Options(**options))


# ---- image tokenizer -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_published_ids_and_pictures_of_the_image_tokenizer_come_out(published, tmp_path: Path) -> None:
    folder = published(VQ)
    import_published(folder, VQ, tmp_path / "m", image_size_px=32)
    model = load_model(tmp_path / "m", ImageTokenizerConfig, ImageTokenizer)
    io = load_file(folder / "io.safetensors")
    assert torch.equal(model.encode(io["x"]), io["indices"])
    torch.testing.assert_close(model.decode(io["indices"]), io["rec"].clamp(-1, 1), atol=1e-4, rtol=0)
    compared = list(FAMILIES[VQ].compare(model, io))
    assert [c.name for c in compared] == ["z", "indices", "rec"] and all(c.agrees for c in compared)


def test_an_image_tokenizer_of_ours_in_that_layout_comes_back_equal(save_native, randomised, tmp_path: Path) -> None:
    model = randomised(ImageTokenizer(VQ_CONFIG))
    path = save_native(tmp_path / "vq.pt", VQ, model, "model", steps=3)
    import_checkpoint(FAMILIES[VQ], path, tmp_path / "m", Options(image_size_px=16))
    found = load_model(tmp_path / "m", ImageTokenizerConfig, ImageTokenizer)
    assert found.config == VQ_CONFIG
    expected = model.state_dict() | {"quantizer.usage": torch.ones(N_IDS)}
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.items())


# ---- GPTs ------------------------------------------------------------------------------------------------------------


def published_gpt(published, name: str, tmp_path: Path) -> tuple[GPT, dict[str, torch.Tensor]]:
    import_published(published(VQ), VQ, tmp_path / "vq", image_size_px=8)
    options = {"vq": tmp_path / "vq"}
    if name == T2I:
        T5EncoderModel(T5Config(d_model=20, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=8)).save_pretrained(
            tmp_path / "t5"
        )
        (tmp_path / "t5" / "spiece.model").write_bytes(b"x")
        options["text_encoder"] = tmp_path / "t5"
    import_published(published(name), name, tmp_path / "gpt", **options)
    return load_model(tmp_path / "gpt", GPTConfig, GPT), load_file(published(name) / "io.safetensors")


@pytest.mark.parametrize("name", [C2I, T2I])
def test_published_logits_come_out_with_and_without_a_condition(published, tmp_path: Path, name: str) -> None:
    gpt, io = published_gpt(published, name, tmp_path)
    compared = {c.name: c for c in FAMILIES[name].compare(gpt, io)}
    logits = {n for n in compared if n.startswith("tf_logits")}
    assert logits == {"tf_logits", "tf_logits_null", *(["tf_logits_nomask"] if name == T2I else [])}
    assert len(compared) - len(logits) == (4 if name == T2I else 3)
    assert all(c.agrees for c in compared.values())


@pytest.mark.parametrize(("drawn", "sampling"), [
    ("gen_cfg1", SamplingConfig(guidance=1.0, top_k=1)),
    ("gen_cfg7p5", SamplingConfig(guidance=7.5, top_k=1)),
    # for the first token and the four after it, of 16
    ("gen_cfg4_interval3", SamplingConfig(guidance=4.0, top_k=1, guidance_interval=(0, 5 / 16))),
])  # fmt: skip
@pytest.mark.parametrize("name", [C2I, T2I])
def test_published_greedy_tokens_are_drawn_by_cached_steps(published, tmp_path: Path, name, drawn, sampling) -> None:
    gpt, io = published_gpt(published, name, tmp_path)
    conditions = io["cond"].tolist()
    if name == T2I:  # alone each has its own vectors and no padding
        counts = io["emb_masks"].sum(1).tolist()
        conditions = [Vectors(n, io["cond"][i, -n:].numpy().tobytes()) for i, n in enumerate(counts)]
    jobs = [Job(condition, i, 0) for i, condition in enumerate(conditions)]
    for rows_at_once in (1, 3):
        ids = decode_image_ids(gpt, jobs, sampling, 0, rows_at_once=rows_at_once).flatten(1)
        assert torch.equal(ids, io[drawn])


@pytest.mark.parametrize("rows", [6, 32])
def test_pairs_are_taken_apart_and_together(rows: int) -> None:
    x = torch.arange(3.0 * rows * 2).view(3 * rows, 2)
    apart = pairs_apart(x, n_heads=1)
    assert apart[:rows, 0].tolist() == [*x[:rows:2, 0].tolist(), *x[1:rows:2, 0].tolist()]
    assert torch.equal(apart[2 * rows :], x[2 * rows :]) and torch.equal(pairs_together(apart, 1), x)
    assert torch.equal(pairs_together(pairs_apart(x, rows // 2), rows // 2), x)


@pytest.mark.parametrize("name", [C2I, T2I])
def test_a_gpt_of_ours_in_that_layout_comes_back_equal(
    save_native, randomised, tmp_path: Path, vq: Path, tiny_t5: Path, arguments: Path, name: str
) -> None:
    fingerprint = load_model(vq, ImageTokenizerConfig, ImageTokenizer).fingerprint
    model = randomised(GPT(gpt_config(name, fingerprint, fingerprint_of(tiny_t5))))
    path = save_native(tmp_path / "gpt.pt", name, model, "model", args=argparse.Namespace(gpt_type=name[-3:]))
    options = Options(settings=arguments, vq=vq, text_encoder=tiny_t5 if name == T2I else None)
    import_checkpoint(FAMILIES[name], path, tmp_path / "m", options)
    found = load_model(tmp_path / "m", GPTConfig, GPT)
    assert found.config == model.config
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [C2I, T2I])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_compiled_code_for_cpus_draws_what_pytorch_draws(randomised, name: str, guidance: float) -> None:
    gpt = randomised(GPT(gpt_config(name)))
    vectors = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).numpy()
    conditions = [0, 2] if name == C2I else [Vectors(3, vectors.tobytes()), Vectors(1, vectors[:1].tobytes())]
    jobs = [Job(condition, i, k) for i, condition in enumerate(conditions) for k in range(2)]
    sampling = SamplingConfig(guidance=guidance, top_k=1)
    native = decode_image_ids(NativeGPT(gpt, "fp32"), jobs, sampling, 0)
    assert torch.equal(native, decode_image_ids(gpt, jobs, sampling, 0)) and len(native.unique()) > 3


@torch.no_grad()
def test_what_stands_before_an_image_is_seen_evenly_whatever_its_order(randomised) -> None:
    ids, vectors = torch.arange(16)[None], torch.randn(4, WIDTH)
    for n_layers in (1, 2):
        config = gpt_config(T2I)
        transformer = config.transformer.model_copy(update={"n_layers": n_layers})
        gpt, logits = randomised(GPT(config.model_copy(update={"transformer": transformer}))), []
        for values in (vectors, vectors.flip(0)):
            batch = gpt.reader.collate([Vectors(4, values.numpy().tobytes())], torch.device("cpu"), whole=True)
            keys = gpt.prefill(gpt.reader(batch))[1].kv[:, 0]
            assert not keys.any()
            logits.append(image_logits(gpt, batch, ids)[:, 1:])
        # behind one layer an image knows the set of the vectors only; behind two, they have seen one another in order
        assert torch.allclose(*logits, atol=1e-5) == (n_layers == 1)


@pytest.mark.parametrize("name", [C2I, T2I])
def test_it_trains(randomised, name: str) -> None:
    gpt = randomised(GPT(gpt_config(name))).train()
    values = [1, 3] if name == C2I else [Vectors(2, torch.ones(2, WIDTH).numpy().tobytes()), Vectors(4)]
    condition = gpt.reader.collate(values, torch.device("cpu"), whole=True)
    loss = gpt_loss(gpt, condition, torch.arange(32).view(2, 16) % N_IDS, 0, LossWeights())
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())


# ---- what nothing tells ----------------------------------------------------------------------------------------------


def refused(fails, name: str, path: Path, *options: object) -> str:
    out = path.parent / "refused"
    told = fails("import_checkpoint", name, path, "--out", out, *options)
    assert not out.exists()
    return told


def test_what_the_weights_do_not_tell_is_asked_for(save_native, fails, tmp_path: Path, vq, tiny_t5, arguments) -> None:
    path = save_native(tmp_path / "gpt.pt", C2I, GPT(gpt_config(C2I)), "model")
    assert "import that one first (llamagen-vq) and give its folder by --vq" in refused(fails, C2I, path)
    assert "2 layers of width 32 are no published size" in refused(fails, C2I, path, "--vq", vq)
    assert "of the family llamagen-gpt-c2i, not llamagen-gpt-t2i" in refused(fails, T2I, path)
    texts = save_native(tmp_path / "t2i.pt", T2I, GPT(gpt_config(T2I)), "model")
    told = refused(fails, T2I, texts, "--vq", vq, "--settings", arguments)
    assert "reads features of texts by Flan-T5 XL; give its local folder by --text-encoder" in told
    options = ("--vq", vq, "--settings", arguments, "--text-encoder", tiny_t5)
    config = json.loads((tiny_t5 / "config.json").read_text())
    (tiny_t5 / "config.json").write_text(json.dumps(config | {"d_model": 16}))
    assert "its features are 16 wide, expected 12" in refused(fails, T2I, texts, *options)
    (tiny_t5 / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "a model of type 'bert', expected a T5" in refused(fails, T2I, texts, *options)


def test_an_image_tokenizer_of_another_vocabulary_or_grid_is_refused(
    save_native, fails, tmp_path: Path, vq, arguments
) -> None:
    options = ("--vq", vq, "--settings", arguments)
    larger = gpt_config(C2I).model_copy(update={"layout": LayoutConfig(n_image_ids=21, grid_height=4, grid_width=4)})
    path = save_native(tmp_path / "gpt.pt", C2I, GPT(larger), "model")
    assert "has 21 image ids" in refused(fails, C2I, path, *options)
    save_model(tmp_path / "g", GPT(larger), larger, {"kind": "gpt"})
    told = refused(fails, C2I, path, "--vq", tmp_path / "g")
    assert "g: a model of kind 'gpt', expected an image tokenizer" in told
    path = save_native(tmp_path / "c2i_B_384.pt", C2I, GPT(gpt_config(C2I)), "model")
    assert "for images of 384 px, the image tokenizer's are of 16 px; import that one with --image-size 384" in refused(
        fails, C2I, path, *options
    )
    around = argparse.Namespace(image_size=256, downsample_size=16)
    path = save_native(tmp_path / "gpt.pt", C2I, GPT(gpt_config(C2I)), "model", args=around)
    assert "for images of 64 px" in refused(fails, C2I, path, *options)
    arguments.write_text(json.dumps({"n_head": 2, "dim": 64}))
    assert "dim is 32 in the weights, 64 in" in refused(fails, C2I, path, *options)


# ---- texts and classes, from prompt to picture -----------------------------------------------------------------------


def test_a_prompt_becomes_a_picture_by_way_of_a_t5(
    save_native, randomised, in_empty_folder: Path, vq: Path, tiny_t5: Path, arguments: Path, capsys
) -> None:
    path = save_native(in_empty_folder / "gpt.pt", T2I, randomised(GPT(gpt_config(T2I))), "model")
    options = ["--vq", str(vq), "--text-encoder", str(tiny_t5), "--settings", str(arguments)]
    assert main(["import_checkpoint", T2I, str(path), "--out", "gpt", *options]) == 0
    assert main(["generate", "A RED square", "--model", "gpt", "--n", "2", "--out", "drawn"]) == 0
    assert main(["make_pipeline", "--model", "gpt", "--out", "pipeline"]) == 0
    pipeline = TextToImage.load("pipeline", "cpu")
    assert (pipeline.config.sampling.guidance, pipeline.config.sampling.top_k) == (7.5, 1000)
    again, lower, other = (
        [sample.image_ids_HW.tolist() for sample in pipeline.generate(prompt, n=2)]
        for prompt in ("A RED square", "a red square", "green")
    )
    assert again == lower != other
    long = pipeline.generate("red " * 9, n=1)[0]
    assert long.n_truncated > 0
    encoder = pipeline.encoder
    ids = encoder.ids(clean_web_caption("A RED square"), 6)
    expected = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    reader = pipeline._reader.condition("A RED square")
    assert reader == Vectors(len(ids), expected.detach().numpy().tobytes()) and ids[-1] == 1


def test_a_class_becomes_a_picture_without_any_tokenizer_of_texts(
    save_native, randomised, in_empty_folder: Path, vq: Path, arguments: Path, fails
) -> None:
    path = save_native(in_empty_folder / "gpt.pt", C2I, randomised(GPT(gpt_config(C2I))), "model")
    options = ["--vq", str(vq), "--settings", str(arguments)]
    assert main(["import_checkpoint", C2I, str(path), "--out", "gpt", *options]) == 0
    assert main(["make_pipeline", "--model", "gpt", "--out", "pipeline"]) == 0
    assert main(["generate", "--model", "pipeline", "--n", "1", "--out", "drawn"]) == 0
    told = fails("generate", "dog", "--model", "pipeline")
    assert "prompt 'dog': no class of this GPT; it reads one of 3: 0, 1, 2" in told
    pipeline = TextToImage.load("pipeline", "cpu")
    assert pipeline.config.sampling.guidance == 4.0 and pipeline.text is None


def test_another_text_encoder_is_refused(
    save_native, tmp_path: Path, vq: Path, tiny_t5: Path, arguments, fails
) -> None:
    path = save_native(tmp_path / "gpt.pt", T2I, GPT(gpt_config(T2I)), "model")
    options = Options(settings=arguments, vq=vq, text_encoder=tiny_t5)
    import_checkpoint(FAMILIES[T2I], path, tmp_path / "m", options)
    config = json.loads((tiny_t5 / "config.json").read_text())
    (tiny_t5 / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.2}))
    assert "made with text encoder" in fails("generate", "red", "--model", tmp_path / "m")


def test_an_imported_gpt_of_texts_goes_on_training_and_draws(
    save_native, randomised, in_empty_folder: Path, vq: Path, tiny_t5: Path, arguments: Path, tiny_dataset: DataSet
) -> None:
    path = save_native(in_empty_folder / "gpt.pt", T2I, randomised(GPT(gpt_config(T2I))), "model")
    options = Options(settings=arguments, vq=vq, text_encoder=tiny_t5)
    base = import_checkpoint(FAMILIES[T2I], path, in_empty_folder / "gpt", options)
    projection = "projection: {kind: mlp, width: 32, bias: false}"
    settings = [
        "name=tuned", f"data.path={tiny_dataset.folder}", f"text_tokenizer={tiny_t5}", "training.start_from=gpt",
        "transformer={width: 32, n_layers: 2, n_heads: 2, mlp_width: 48, norm_eps: 1.0e-5, qk_norm: false}",
        "positions=rotary_image", "training.reversed_share=0", "training.null_share=0.5", "training.compile=false",
        f"condition={{kind: features, encoder: {tiny_t5}, n_vectors: 6, {projection}, cleaning: web}}",
        "trainer={max_steps: 2, batch_size: 8, validate_every_steps: 2, n_validation_samples: 7, precision: fp32}",
    ]  # fmt: skip
    assert main(["train_gpt", "--vq", str(vq), *(part for s in settings for part in ("--set", s))]) == 0
    before, after = (load_model(folder, GPTConfig, GPT) for folder in (Path("gpt"), Path("runs/tuned/model")))
    assert before.config == after.config
    changed = {n for n, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[n])}
    assert changed == {name for name, _ in after.named_parameters()}
    card = read_card(Path("runs/tuned/model"))
    assert card["start_from"]["fingerprint"] == base and card["text_encoder"]["path"] == str(tiny_t5)
    assert main(["generate", "a red square", "--model", "runs/tuned", "--n", "1", "--out", "drawn"]) == 0


@torch.no_grad()
def test_training_reads_the_features_that_drawing_reads(tiny_t5: Path) -> None:
    encoder = TextEncoder.load(tiny_t5)
    config = CaptionFeatures(encoder=tiny_t5, n_vectors=6, projection=LinearProjection(), cleaning="web")
    texts = ["A RED square", "", "green square square green red square red"]
    ids = [encoder.tokenizer.encode(text) for text in texts]
    batch = Batch(None, None, pad_texts(ids, 40), torch.zeros(3))
    found = Conditioner(config, encoder=encoder).of_images(batch, training=True)
    assert found.null_B.tolist() == [False, True, False] and found.vectors_BNC.shape == (3, 6, WIDTH)
    for row in (0, 2):
        (expected,) = encoder.features([encoder.ids(clean_web_caption(texts[row]), 6)])
        torch.testing.assert_close(found.vectors_BNC[row][found.real_BN[row]], expected)
        assert found.real_BN[row].tolist() == sorted(found.real_BN[row].tolist())
