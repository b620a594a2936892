"""CLIP's tokenizer in every form that it is published in, beside that of `transformers`."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from vqt2i.errors import CheckpointError, ConfigError
from vqt2i.text import load_tokenizer
from vqt2i.text.huggingface import END, START, find_clip_tokenizer, load_own_tokenizer

MERGES = ["r e", "re d</w>", "s q", "sq u", "squ a", "squa r", "squar e</w>", "' s</w>", "Ã ©</w>"]
TEXTS = [
    "a red square", "", "  RED\n\tsquare's  ", "naïve café 12 3!", "红色的正方形", "e\u0301", "squared reds",
    "'ll we're", "🙂 (x)",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vocab.json` and `merges.txt`, with ids in CLIP's order."""
    folder = tmp_path_factory.mktemp("clip")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in MERGES), START, END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder


def test_ids_are_those_of_transformers_and_the_text_comes_back(folder: Path) -> None:
    found, theirs = find_clip_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)
    assert (found.start, found.end, found.n_ids) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    for text in TEXTS:
        assert found.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert found.decode(found.encode("A Red  square")) == "a red square" and len(found.encode("a red square")) == 3


def test_every_form_gives_the_same_ids(folder: Path, tmp_path: Path) -> None:
    expected = find_clip_tokenizer(folder)
    (tmp_path / "json").mkdir()
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "json")
    own = tmp_path / "own"
    own.mkdir()
    for name, content in expected.files.items():
        (own / name).write_bytes(content)
    openai = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    openai.write_bytes(gzip.compress("\n".join(["a heading", *MERGES]).encode()))
    paths = folder / "merges.txt", folder / "vocab.json", tmp_path / "json", openai, own
    forms = [load_own_tokenizer(own), load_tokenizer(own), load_tokenizer(own / "tokenizer.json")]
    for form in [*map(find_clip_tokenizer, paths), *forms]:
        assert [form.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
        assert (form.start, form.end, form.n_ids) == (expected.start, expected.end, expected.n_ids)
    assert load_own_tokenizer(own).fingerprint == expected.fingerprint


def test_openai_vocabularies_are_read_up_to_the_merges_that_they_use(tmp_path: Path) -> None:
    merges = [f"{chr(33 + i // 94)} {chr(33 + i % 94)}" for i in range(60 * 94)]  # all different
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["a heading", *(merges * 20)]).encode()))
    assert len(merges * 20) > 49408
    found = find_clip_tokenizer(path)
    assert found.end == found.start + 1


def test_what_is_none_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_clip_tokenizer(tmp_path) is None and load_own_tokenizer(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"nothing: no such file; expected CLIP's tokenizer as tokenizer\.json"):
        find_clip_tokenizer(tmp_path / "nothing")
    for name, content, told in (
        ("a.gz", b"no archive", "a.gz: .*expected CLIP's tokenizer as"),
        ("merges.txt", b"a b\nc d e\n", "merges of 3 parts"),
        ("tokenizer.json", b"{}", "not a tokenizer of `tokenizers`"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        (tmp_path / "vocab.json").write_text("{}")
        with pytest.raises(CheckpointError, match=told):
            find_clip_tokenizer(path)
        path.unlink()
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    for vocabulary, told in (
        ({}, "no <|startoftext|> and <|endoftext|>"),
        ({START: 0, END: 1}, "is not in the vocabulary"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        with pytest.raises(CheckpointError, match=re.escape(told)):
            find_clip_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs the library `tokenizers`; pip install 'vqt2i\[clip\]'"):
        find_clip_tokenizer(folder)
