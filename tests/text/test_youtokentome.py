from pathlib import Path

import pytest

from vqt2i.errors import CheckpointError
from vqt2i.text import load_tokenizer
from vqt2i.text.youtokentome import YouTokenToMe

# the characters ▁ a b c, then ab, ▁c, cab, abab; unknown 1, padding 0, begin 2, end 3
MODEL = "4 4\n9601 4\n97 5\n98 6\n99 7\n5 6 8\n4 7 9\n7 8 10\n8 8 11\n1 0 2 3\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> YouTokenToMe:
    (tmp_path / "bpe.model").write_text(MODEL)
    return load_tokenizer(tmp_path / "bpe.model")


@pytest.mark.parametrize(("text", "ids"), [
    ("ab", [2, 4, 8, 3]),
    ("AB", [2, 4, 8, 3]),
    ("abab ab", [2, 4, 11, 4, 8, 3]),
    ("cab", [2, 9, 8, 3]),  # ▁c is the earlier merge, which leaves no c for cab
    ("acab", [2, 4, 5, 10, 3]),
    ("aabab", [2, 4, 5, 11, 3]),
    (" a\tb\n\u2581c ", [2, 4, 5, 4, 6, 9, 3]),
    ("axyzb", [2, 4, 5, 1, 6, 3]),  # a run of unknown characters is one id
    ("", []),
])  # fmt: skip
def test_merges_are_done_by_rank_then_from_the_left(tokenizer: YouTokenToMe, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


def test_it_is_told_from_a_sentencepiece_model_and_comes_back(
    tokenizer: YouTokenToMe, tmp_path: Path, tiny_text
) -> None:
    assert (tokenizer.n_ids, tokenizer.decode(tokenizer.encode("cab  ab"))) == (12, "cab ab")
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    again = load_tokenizer(folder)
    assert isinstance(again, YouTokenToMe) and again.fingerprint == tokenizer.fingerprint
    (folder / "text.model").write_bytes(tiny_text.model)
    assert load_tokenizer(folder).fingerprint == tiny_text.fingerprint


@pytest.mark.parametrize(("content", "told"), [
    (MODEL[:40], "not a model of youtokentome, or a damaged one"),
    (MODEL.replace("5 6 8", "5 66 8"), "merges the ids 5 and 66, which nothing makes"),
    ("4 4\nno\n", "not a model of youtokentome"),
])  # fmt: skip
def test_a_damaged_one_is_refused(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "bpe.model").write_text(content)
    with pytest.raises(CheckpointError, match=told):
        load_tokenizer(tmp_path / "bpe.model")
