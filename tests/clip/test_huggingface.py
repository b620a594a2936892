"""A CLIP of `transformers` as a scorer: made here with random weights, and one with published outputs where it lies."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from tokenizers import Tokenizer, models, pre_tokenizers
from vqt2i.clip import embed_images, embed_texts
from vqt2i.clip.huggingface import HuggingFaceCLIP, HuggingFaceConfig, load_scorer
from vqt2i.data.images import to_tensor
from vqt2i.errors import CheckpointError
from vqt2i.text import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "fixtures" / "peers" / "clip" / "hf"
WORDS = ["a", "red", "blue", "square", "<|startoftext|>", "<|endoftext|>"]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "clip"
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 8, "eos_token_id": 5, "bos_token_id": 4, **SMALL}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={"image_size": 16, "patch_size": 8, **SMALL}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@torch.no_grad()
def test_embeddings_are_those_of_transformers(folder: Path) -> None:
    scorer, tokenizer, model = load_scorer(folder), load_tokenizer(folder), CLIPModel.from_pretrained(folder).eval()
    assert (scorer.config.image_size_px, scorer.config.text_length, scorer.config.embedding_width) == (16, 6, 12)
    assert scorer.config.text_tokenizer == tokenizer.fingerprint
    ids = [tokenizer.encode(text) for text in ("a red square", "", "blue blue red a a square red red")]
    assert ids[0] == [0, 1, 3] and tokenizer.decode(ids[0]) == "a red square" and len(ids[2]) == 8
    found = embed_texts(scorer, ids)
    for row, text in enumerate(ids):
        alone = model.get_text_features(input_ids=torch.tensor([[4, *text[:6], 5]]))
        alone = getattr(alone, "pooler_output", alone)
        torch.testing.assert_close(found[row], torch.nn.functional.normalize(alone, dim=-1)[0])
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = ((image + 1) / 2 - scorer.mean_311) / scorer.std_311
    features = model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    torch.testing.assert_close(embed_images(scorer, image), torch.nn.functional.normalize(features, dim=-1))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published outputs are not beside this checkout")
@torch.no_grad()
def test_published_outputs_come_out() -> None:
    expected, model = load_file(SHARED / "io.safetensors"), CLIPModel.from_pretrained(SHARED).eval()
    ids, n_B = expected["token_ids"], expected["attention_mask"].sum(1)
    marks = int(ids[0, 0]), int(ids[0, n_B[0] - 1])
    scorer = HuggingFaceCLIP(model, HuggingFaceConfig.of(model, ""), marks).eval()
    torch.testing.assert_close(scorer.encode_text(ids[:, 1:-1], n_B - 2), expected["text_embeds"], atol=1e-5, rtol=0)
    image = to_tensor(expected["pixels_uint8"].movedim(1, -1))
    torch.testing.assert_close(scorer.encode_image(image), expected["image_embeds"], atol=1e-5, rtol=0)


def test_its_fingerprint_is_that_of_its_content(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert load_scorer(copy).fingerprint == load_scorer(folder).fingerprint
    config = json.loads((copy / "config.json").read_text()) | {"logit_scale_init_value": 1.0}
    (copy / "config.json").write_text(json.dumps(config))
    assert load_scorer(copy).fingerprint != load_scorer(folder).fingerprint


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_folder_without_its_files_is_refused(folder: Path, tmp_path: Path, missing: str) -> None:
    for path in folder.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{missing}: No such file"):
        load_scorer(tmp_path)
