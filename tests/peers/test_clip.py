"""Published CLIPs: those of `transformers`, made here with random weights, in every layout; and what lies beside."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel

from tokenizers import Tokenizer, models, pre_tokenizers
from vqt2i.checkpoint import load_model, read_card, save_model
from vqt2i.cli import main
from vqt2i.clip import CLIP, CLIPConfig, embed_images, embed_texts
from vqt2i.data.images import to_tensor
from vqt2i.generation.find import find_parts, open_pipeline, write_pipeline
from vqt2i.generation.native import native_clip
from vqt2i.generation.pipeline import TextToImage
from vqt2i.peers import FAMILIES, Options
from vqt2i.peers.convert import import_checkpoint
from vqt2i.text import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")  # which OpenAI's files are made by
WORDS = ["a", "red", "blue", "square", "<|startoftext|>", "<|endoftext|>"]
TOKENIZER = "tokenizer.json"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def make_model(activation: str = "quick_gelu", eps: float = 1e-5, **text: int) -> CLIPModel:
    """Towers of 64 and 128, with heads 64 wide as in OpenAI's."""
    common = {"num_hidden_layers": 2, "hidden_act": activation, "layer_norm_eps": eps}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    marks = {"bos_token_id": 4, "eos_token_id": 5} | text
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "vocab_size": len(WORDS),
            "max_position_embeddings": 8, **marks}  # fmt: skip
    config = TheirConfig(text_config=common | text, vision_config=common | vision, projection_dim=12)
    model, generator = CLIPModel(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(std=0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return make_model()


@pytest.fixture
def folder(model: CLIPModel, tmp_path: Path) -> Path:
    """As `transformers` saves it, with a tokenizer of few words."""
    model.save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf" / TOKENIZER)
    return tmp_path / "hf"


def save_tokenizer(path: Path, words: list[str] = WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def openai_state(model: CLIPModel) -> dict[str, Tensor]:
    """The same weights by OpenAI's names, told anew here."""
    theirs, found = model.state_dict(), {"logit_scale": model.logit_scale.detach()}
    for part, prefix in (("vision", "visual."), ("text", "")):
        source = f"{part}_model."
        for layer in range(2):
            old, new = f"{source}encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                qkv = [theirs[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                found[f"{new}attn.in_proj_{kind}"] = torch.cat(qkv)
                found[f"{new}attn.out_proj.{kind}"] = theirs[f"{old}self_attn.out_proj.{kind}"]
                found[f"{new}ln_1.{kind}"] = theirs[f"{old}layer_norm1.{kind}"]
                found[f"{new}ln_2.{kind}"] = theirs[f"{old}layer_norm2.{kind}"]
                found[f"{new}mlp.c_fc.{kind}"] = theirs[f"{old}mlp.fc1.{kind}"]
                found[f"{new}mlp.c_proj.{kind}"] = theirs[f"{old}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = theirs[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = theirs[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = theirs[f"text_model.final_layer_norm.{kind}"]
    found["visual.class_embedding"] = theirs["vision_model.embeddings.class_embedding"]
    found["visual.conv1.weight"] = theirs["vision_model.embeddings.patch_embedding.weight"]
    found["visual.positional_embedding"] = theirs["vision_model.embeddings.position_embedding.weight"]
    found["positional_embedding"] = theirs["text_model.embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = theirs["text_model.embeddings.token_embedding.weight"]
    found["visual.proj"] = theirs["visual_projection.weight"].T.contiguous()
    found["text_projection"] = theirs["text_projection.weight"].T.contiguous()
    assert sum(v.numel() for v in found.values()) == sum(p.numel() for p in model.parameters())
    return found


SCALARS = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(8), "vocab_size": torch.tensor(6)}


class Scripted(nn.Module):
    """A tree of modules that have these parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> torch.jit.ScriptModule:
        root = cls()
        for name, value in state.items():
            *path, last = name.split(".")
            module = root
            for part in path:
                if part not in module._modules:
                    module.add_module(part, cls())
                module = module._modules[part]
            module.register_buffer(last, value)
        return torch.jit.script(root)


def save_openai(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state | SCALARS, path)
    return path


def save_torchscript(path: Path, state: dict[str, Tensor]) -> Path:
    torch.jit.save(Scripted.of(state | SCALARS), path)
    return path


def save_open_clip(folder: Path, state: dict[str, Tensor], *, file: str = "open_clip_pytorch_model.bin",
                   vision: dict | None = None, text: dict | None = None, **more: object) -> Path:  # fmt: skip
    folder.mkdir()
    (save_file if file.endswith("safetensors") else torch.save)(state, folder / file)
    vision_cfg = {"image_size": 16, "layers": 2, "width": 128, "patch_size": 8} | (vision or {})
    text_cfg = {"context_length": 8, "vocab_size": 6, "width": 64, "heads": 1, "layers": 2} | (text or {})
    settings = {"embed_dim": 12, "vision_cfg": vision_cfg, "text_cfg": text_cfg} | more
    pixels = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": pixels}))
    return folder


def imported(path: Path, out: Path, **options: Path) -> CLIP:
    import_checkpoint(FAMILIES["clip"], path, out, Options(**options))
    return load_model(out, CLIPConfig, CLIP)


def exported(folder: Path, out: Path) -> CLIPModel:
    assert main(["export", str(folder), "--to", "hf-clip", "--out", str(out)]) == 0
    return CLIPModel.from_pretrained(out).eval()


@torch.no_grad()
def require_same_outputs(scorer: CLIP, model: CLIPModel, mean: list[float] = MEAN, std: list[float] = STD) -> None:
    image_HW3 = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    texts = [[0, 1, 3], [], [2, 2, 1, 0, 0, 3]]
    pixels = torch.from_numpy(image_HW3).movedim(-1, 1) / 255 - torch.tensor(mean)[:, None, None]
    pixels = pixels / torch.tensor(std)[:, None, None]
    image_BE, text_BE = embed_images(scorer, to_tensor(image_HW3)), embed_texts(scorer, texts)
    found = scorer.logit_scale() * image_BE @ text_BE.T
    for row, text in enumerate(texts):
        theirs = model(input_ids=torch.tensor([[4, *text, 5]]), pixel_values=pixels)
        torch.testing.assert_close(image_BE, theirs.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(text_BE[row], theirs.text_embeds[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[:, row], theirs.logits_per_image[:, 0], atol=1e-4, rtol=0)


def test_the_models_of_transformers_keep_their_outputs(folder: Path, model: CLIPModel, tmp_path: Path) -> None:
    scorer = imported(folder, tmp_path / "out")
    require_same_outputs(scorer, model)
    assert (scorer.config.image_size_px, scorer.config.text_length, scorer.config.embedding_width) == (16, 6, 12)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.encode("a red square") == [0, 1, 3]
    assert scorer.config.text_tokenizer == tokenizer.fingerprint
    card = read_card(tmp_path / "out")
    assert card["kind"] == "clip" and card["source"]["file"] == "model.safetensors" and card["licence"] == "unknown"
    assert imported(folder / "model.safetensors", tmp_path / "again").fingerprint == scorer.fingerprint


def test_old_files_of_transformers_are_read_too(tmp_path: Path) -> None:
    model = make_model("gelu", bos_token_id=0, eos_token_id=2)  # the end is then the highest id
    model.save_pretrained(tmp_path / "old")
    state = load_file(tmp_path / "old" / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": STD}))
    require_same_outputs(imported(tmp_path / "old", tmp_path / "out"), model, mean=[0.5] * 3)
    assert load_model(tmp_path / "out", CLIPConfig, CLIP).config.text_tokenizer == "unknown"


@pytest.mark.parametrize("save", [save_openai, save_torchscript])
def test_openais_files_keep_their_outputs(save: Callable, model: CLIPModel, tmp_path: Path) -> None:
    scorer = imported(save(tmp_path / "ViT.pt", openai_state(model)), tmp_path / "out")
    require_same_outputs(scorer, model)
    assert read_card(tmp_path / "out")["licence"] == "MIT"
    half = {name: value.half() if value.ndim > 1 else value for name, value in openai_state(model).items()}
    scorer = imported(save(tmp_path / "half.pt", half), tmp_path / "half")
    assert load_file(tmp_path / "half" / "weights.safetensors")["text_embedding.weight"].dtype == torch.float16
    rounded = CLIPModel(model.config).eval()
    rounded.load_state_dict({name: v.half().float() if v.ndim > 1 else v for name, v in model.state_dict().items()})
    require_same_outputs(scorer, rounded)


@pytest.mark.parametrize(
    ("activation", "heads", "file"),
    [("gelu", 2, "open_clip_model.safetensors"), ("quick_gelu", 4, "open_clip_pytorch_model.bin")],
)
def test_files_of_open_clip_keep_their_outputs(activation: str, heads: int, file: str, tmp_path: Path) -> None:
    model = make_model(activation)
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.num_heads, layer.self_attn.head_dim = heads, 128 // heads
        layer.self_attn.scale = layer.self_attn.head_dim**-0.5
    folder = save_open_clip(
        tmp_path / "open", openai_state(model), file=file, vision={"head_width": 128 // heads},
        quick_gelu=activation == "quick_gelu",
    )  # fmt: skip
    save_tokenizer(folder / TOKENIZER)
    scorer = imported(folder, tmp_path / "out")
    assert scorer.config.vision.n_heads == heads
    require_same_outputs(scorer, model)


@pytest.mark.parametrize("name", ["hf", "open_clip", "openai/model.pt"])
def test_published_outputs_come_out(published, name: str, tmp_path: Path, capsys) -> None:
    path = published("clip") / name
    io = (path if path.is_dir() else path.parent) / "io.safetensors"
    arguments = ["import_checkpoint", "clip", path, "--out", tmp_path / "out", "--check", io]
    assert main(list(map(str, arguments))) == 0
    told = capsys.readouterr().err
    assert all(f"check: {name} differs by" in told for name in ("image_embeds", "text_embeds", "logits_per_image"))


def test_check_refuses_other_outputs(folder: Path, model: CLIPModel, tmp_path: Path, fails) -> None:
    scorer = imported(folder, tmp_path / "out")
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[4, 1, 3, 5, 5, 5, 5, 5], [4, 5, 0, 0, 0, 0, 0, 0]])
    with torch.inference_mode():
        image_BE, text_BE = embed_images(scorer, to_tensor(pixels.movedim(1, -1))), embed_texts(scorer, [(1, 3), ()])
    logits = scorer.logit_scale().detach() * image_BE @ text_BE.T
    io = {"pixels_uint8": pixels, "token_ids": ids, "image_embeds": image_BE.clone(), "text_embeds": text_BE.clone(),
          "logits_per_image": logits.clone()}  # fmt: skip
    save_file(io, tmp_path / "io.safetensors")
    arguments = ["import_checkpoint", "clip", folder, "--check", tmp_path / "io.safetensors", "--out"]
    assert main([*map(str, arguments), str(tmp_path / "same")]) == 0
    save_file(io | {"text_embeds": text_BE.flip(0).clone()}, tmp_path / "io.safetensors")
    assert "text_embeds differ from what is recorded" in fails(*arguments, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def refusal(fails, path: Path, *options: object) -> str:
    """What is told of a checkpoint that is refused; nothing is written."""
    out = path.parent / "refused"
    told = fails("import_checkpoint", "clip", path, "--out", out, *options)
    assert not out.exists() and not list(path.parent.glob(".vqt2i*"))
    return told


def test_another_family_and_names_too_few_or_too_many_are_told(fails, model: CLIPModel, tmp_path: Path) -> None:
    state = openai_state(model)
    path = save_openai(tmp_path / "a.pt", state)
    out = ("--out", tmp_path / "o")
    assert "of the family clip, not taming-vqgan" in fails("import_checkpoint", "taming-vqgan", path, *out)
    resnet = {name: value for name, value in state.items() if not name.startswith("visual.")}
    save_openai(path, resnet | {"visual.layer1.0.conv1.weight": torch.ones(1)})
    assert "lacks visual.class_embedding" in refusal(fails, path)
    save_openai(path, {n: v for n, v in state.items() if n != "ln_final.bias"} | {"logit_bias": torch.ones(())})
    told = refusal(fails, path)
    assert "lacks ln_final.bias" in told and "has logit_bias" in told
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    save_openai(path, {n: v for n, v in state.items() if n != first})
    assert f"it lacks {first}" in refusal(fails, path)
    save_openai(path, state | {first: torch.ones(4)})
    assert "weights or settings unlike those of a CLIP" in refusal(fails, path)
    save_openai(path, state | {"visual.proj": torch.ones(12, 128)})
    assert "visual.proj: found (12, 128), expected what makes (12, 128)" in refusal(fails, path)
    save_openai(path, state | {"visual.positional_embedding": torch.ones(7, 128)})
    assert "6 patches of an image, which are no square" in refusal(fails, path)


@pytest.mark.parametrize("save", [save_openai, save_torchscript])
def test_a_file_that_is_cut_short_is_told(save: Callable, fails, model: CLIPModel, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", openai_state(model))
    path.write_bytes(path.read_bytes()[:-5000])
    assert "damaged or not a checkpoint" in refusal(fails, path)
    assert "no such file" in refusal(fails, tmp_path / "none.pt")
    (tmp_path / "empty").mkdir()
    assert "expected a file with weights, or one of model.safetensors" in refusal(fails, tmp_path / "empty")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(fails, model: CLIPModel, tmp_path: Path) -> None:
    path, trap = tmp_path / "a.pt", tmp_path / "trap"
    torch.save(openai_state(model) | {"hook": Trap(trap)}, path)
    assert "not opened, for loading it would run" in refusal(fails, path)
    save_torchscript(tmp_path / "whole.pt", openai_state(model))
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w") as archive:
        for info in whole.infolist():
            content = whole.read(info)
            archive.writestr(info, pickle.dumps(Trap(trap)) if info.filename.endswith("/data.pkl") else content)
    assert "a.pt: not opened, for loading it would run posix.mkdir" in refusal(fails, path)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w") as archive:
        for info in whole.infolist():  # code that would run if the archive were loaded as such
            code = info.filename.endswith(".py")
            archive.writestr(info, b"import os; os.mkdir('trap')" if code else whole.read(info))
    require_same_outputs(imported(path, tmp_path / "out"), model)
    assert not trap.exists() and not Path("trap").exists()


def test_settings_that_are_missing_or_of_another_model_are_told(fails, model: CLIPModel, tmp_path: Path) -> None:
    state = openai_state(model)
    torch.save(state, tmp_path / "a.pt")
    assert "there is no open_clip_config.json beside it and no input_resolution" in refusal(fails, tmp_path / "a.pt")
    folder = save_open_clip(tmp_path / "open", state)
    require_same_outputs(
        imported(tmp_path / "a.pt", tmp_path / "out", settings=folder / "open_clip_config.json"), make_model("gelu")
    )
    for n, (values, told) in enumerate((
        ({"vision": {"width": 64}}, "vision_cfg.width is 64, in open_clip_pytorch_model.bin 128"),
        ({"text": {"layers": 3}}, "text_cfg.layers is 3, in open_clip_pytorch_model.bin 2"),
        ({"vision": {"timm_model_name": "resnet"}}, "vision_cfg.timm_model_name: 'resnet', which this scorer has no"),
        ({"text": {"pool_type": "last"}}, "text_cfg.pool_type: 'last', which this scorer has no choice for"),
        ({"custom_text": True}, "model_cfg.custom_text: True"),
        ({"vision": {"head_width": 48}}, "a tower 128 wide is no multiple of its heads' 48"),
        ({"vision": {"head_width": "wide"}}, "weights or settings unlike those of a CLIP"),
        ({"text": {"heads": 5}}, "texts: (top level): width 64 must be n_heads (5) times"),
        ({"text_cfg": None}, "expected settings of open_clip, with vision_cfg and text_cfg"),
    )):  # fmt: skip
        assert told in refusal(fails, save_open_clip(tmp_path / str(n), state, **values))
    harmless = {"vision": {"pool_type": "tok", "patch_dropout": 0.5}, "text": {"no_causal_mask": False}}
    imported(save_open_clip(tmp_path / "harmless", state, **harmless), tmp_path / "harmless-out")


def test_settings_of_transformers_that_are_missing_or_unknown_are_told(fails, folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["hidden_act"] = "relu"
    (folder / "config.json").write_text(json.dumps(settings))
    assert "text_config.hidden_act: 'relu', expected one of quick_gelu, gelu" in refusal(fails, folder)
    (folder / "config.json").write_text("[]")
    assert "config.json: expected a JSON object, found a list" in refusal(fails, folder)
    (folder / "config.json").unlink()
    assert "config.json: No such file or directory; expected the model's settings" in refusal(fails, folder)


def test_a_tokenizer_of_another_model_is_told(fails, folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / TOKENIZER, ["more", *WORDS])
    told = refusal(fails, folder, "--text", tmp_path / TOKENIZER)
    assert "texts are marked by the ids 4 and 5, by its tokenizer with 5 and 6; give its own by --text" in told
    (tmp_path / "none").mkdir()
    assert "no tokenizer in it; expected tokenizer.json" in refusal(fails, folder, "--text", tmp_path / "none")
    (folder / TOKENIZER).rename(tmp_path / "mine.json")
    scorer = imported(folder, tmp_path / "out", text=tmp_path / "mine.json")
    assert scorer.config.text_tokenizer == load_tokenizer(tmp_path / "out").fingerprint


def test_the_way_back_gives_transformers_the_same_model(folder: Path, model: CLIPModel, tmp_path: Path) -> None:
    for name, path in (("hf", folder), ("openai", save_openai(tmp_path / "a.pt", openai_state(model)))):
        scorer = imported(path, tmp_path / name / "ours")
        back = exported(tmp_path / name / "ours", tmp_path / name / "back")
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
        require_same_outputs(scorer, back)
        again = imported(tmp_path / name / "back", tmp_path / name / "again")
        assert again.fingerprint == scorer.fingerprint
    assert (tmp_path / "hf" / "back" / TOKENIZER).is_file()


def test_a_large_scale_is_exported_as_it_is_used(folder: Path, tmp_path: Path) -> None:
    scorer = imported(folder, tmp_path / "ours")
    scorer.logit_scale.log.data.fill_(9.0)
    save_model(tmp_path / "ours", scorer, scorer.config, {"kind": "clip"})
    back = exported(tmp_path / "ours", tmp_path / "back")
    assert back.logit_scale.exp().item() == pytest.approx(100) == scorer.logit_scale().item()


def test_a_scorer_with_choices_of_ours_is_not_exported(model_folders: Path, tmp_path: Path, fails) -> None:
    told = fails("export", model_folders / "clip", "--to", "hf-clip", "--out", tmp_path / "back")
    assert "clip has no place for image_readout.kind mean, text_readout.kind mean, vision.norm rms" in told
    assert "vision.mlp swiglu" in told
    assert not (tmp_path / "back").exists()
    told = fails("export", model_folders / "clip", "--to", "hf-clip", "--step", 3, "--out", tmp_path / "back")
    assert "--to hf-clip: of a model folder" in told


@torch.no_grad()
def test_the_native_engine_scores_by_it_too(folder: Path, tmp_path: Path) -> None:
    scorer = imported(folder, tmp_path / "out")
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, expected = (embed_images(clip, images) for clip in (native_clip(scorer, "fp32"), scorer))
    torch.testing.assert_close(found, expected)


def test_it_scores_a_pipeline_that_reads_another_tokenizer(
    folder: Path, model_folders: Path, tmp_path: Path, in_empty_folder: Path, fails
) -> None:
    scorer = imported(folder, tmp_path / "clip")
    model, clip = str(model_folders), str(tmp_path / "clip")
    command = ["generate", "a red square", "--rerank", "3", "--model", model, "--clip", clip, "--out"]
    assert main([*command, "drawn"]) == 0
    assert scorer.fingerprint in Path("drawn/request.json").read_text()
    pipeline = open_pipeline(str(model_folders), tmp_path, "cpu", clip=tmp_path / "clip")
    assert pipeline.fingerprints["clip"] == scorer.fingerprint and pipeline.text.encode("a") != [0]
    samples = pipeline.generate("a red square", n=3, rerank=3)
    with torch.no_grad():
        drawn = embed_images(scorer, to_tensor(np.stack([sample.image_HW3 for sample in samples])))
        cosine = (drawn * embed_texts(scorer, [[0, 1, 3]])).sum(-1)
    torch.testing.assert_close(torch.tensor([s.scores["clip"] for s in samples]), cosine, atol=0.01, rtol=0)

    write_pipeline(*find_parts(str(model_folders), tmp_path, clip=tmp_path / "clip"), tmp_path / "bound", "fp32")
    bound = TextToImage.load(tmp_path / "bound", "cpu")
    assert bound.clip_text.encode("a red square") == [0, 1, 3]
    assert bound.generate("a red square", n=1, rerank=3)[0].scores == samples[0].scores

    (tmp_path / "clip" / TOKENIZER).unlink()
    assert "made with text tokenizer" in fails(*command, "again")
