import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import T5Tokenizer

from vqt2i.errors import CheckpointError
from vqt2i.text.encoder import TextEncoder, fingerprint_of

TEXTS = ["a red square", "two  spaces, and CAPS!", "ünïcode — dashes", "", "a:b (c) 12,000", "红色正方形"]


@torch.inference_mode()
def test_features_of_texts_read_together_are_those_of_each_alone(tiny_t5: Path) -> None:
    encoder = TextEncoder.load(tiny_t5)
    ids = [encoder.ids(text, 9) for text in ("a red square", "", "green square green square")]
    assert [row[-1] for row in ids] == [1, 1, 1] and len(ids[1]) == 1 and len(encoder.ids("red " * 20, 9)) == 9
    for together, row in zip(encoder.features(ids), ids, strict=True):
        torch.testing.assert_close(together, encoder.features([row])[0])


def test_ids_are_those_of_the_tokenizer_of_transformers(tiny_t5: Path) -> None:
    model, lines = io.BytesIO(), [f"{text} and a blue square {n}" for n, text in enumerate(TEXTS * 20)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tiny_t5 / "spiece.model").write_bytes(model.getvalue())
    ours, theirs = TextEncoder.load(tiny_t5), T5Tokenizer.from_pretrained(tiny_t5, extra_ids=0)
    for text in [*TEXTS, "square " * 9]:
        expected = theirs(text, max_length=8, truncation=True, add_special_tokens=True)["input_ids"]
        assert ours.ids(text, 8) == expected and expected[-1] == 1


def test_the_fingerprint_is_that_of_tokenizer_and_weights_in_one_file_or_several(tiny_t5: Path) -> None:
    prints = {fingerprint_of(tiny_t5)}
    assert TextEncoder.load(tiny_t5).fingerprint in prints
    (tiny_t5 / "other").write_text("README")
    assert fingerprint_of(tiny_t5) in prints
    weights = tiny_t5 / "model.safetensors"
    for name in ("a", "b"):
        (tiny_t5 / f"{name}.safetensors").write_bytes(weights.read_bytes() + name.encode())
    (tiny_t5 / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    assert fingerprint_of(tiny_t5) not in prints
    (tiny_t5 / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: not there"):
        fingerprint_of(tiny_t5)


@pytest.mark.parametrize(("name", "content", "told"), [
    ("config.json", "{", "expected a T5"), ("config.json", "[]", "expected a JSON object"),
    ("config.json", '{"model_type": "bert"}', "a model of type 'bert', expected a T5"),
    ("model.safetensors", "x", "not a T5 of `transformers`"), ("spiece.model", "x", "not a SentencePiece model"),
])  # fmt: skip
def test_a_damaged_encoder_is_refused(tiny_t5: Path, name: str, content: str, told: str) -> None:
    (tiny_t5 / name).write_text(content)
    with pytest.raises(CheckpointError, match=told):
        TextEncoder.load(tiny_t5)


def test_a_tokenizer_of_more_ids_than_the_model_knows_is_refused(tiny_t5: Path) -> None:
    config = json.loads((tiny_t5 / "config.json").read_text())
    model = TextEncoder.load(tiny_t5).model
    model.resize_token_embeddings(100)
    model.save_pretrained(tiny_t5)
    assert config["vocab_size"] > 100
    with pytest.raises(CheckpointError, match="the model knows 100; they do not belong together"):
        TextEncoder.load(tiny_t5)
