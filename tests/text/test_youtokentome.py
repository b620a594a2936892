from pathlib import Path

import pytest

from vqt2i.errors import CheckpointError
from vqt2i.text import load_tokenizer
from vqt2i.text.youtokentome import YouTokenToMe

# the characters ▁ a b c, then ab, ▁c, cab, abab; unknown 1, padding 0, begin 2, end 3
MODEL = "4 4\n9601 4\n97 5\n98 6\n99 7\n5 6 8\n4 7 9\n7 8 10\n8 8 11\n1 0 2 3\n"

# what youtokentome 1.0.6 made of five lines about cats, squares and circles: yttm.BPE.train(..., vocab_size=70)
ITS_OWN = """\
30 36|1076 20|1089 11|115 29|1081 13|1086 16|99 18|1099 19|1078 24|1091 23|117 21|1075 26|101 9|1088 12|114 15|
1080 5|1072 14|1085 8|98 33|1077 25|1090 10|116 28|1082 6|9601 4|108 22|1074 27|100 17|113 30|105 32|97 7|110 31|
4 6 34|4 7 35|4 11 36|36 5 37|5 13 38|15 9 39|8 38 40|39 17 41|37 40 42|4 41 43|34 16 44|34 12 45|44 10 46|4 18 47|
12 14 48|47 32 49|48 10 50|49 15 51|20 50 52|51 18 53|14 52 54|53 22 55|27 54 56|55 9 57|34 56 58|47 7 59|45 14 60|
59 28 61|60 11 62|45 23 63|62 8 64|63 26 65|64 19 66|7 39 67|66 13 68|21 67 69|1 0 2 3
"""
ITS_IDS = [
    ("рыжий квадрат", [4, 12, 19, 24, 38, 58]),
    ("a blue cat", [35, 4, 33, 22, 21, 9, 61]),
    ("синий  круг 红 и red", [42, 65, 4, 1, 4, 5, 43]),
    ("кот\u00a0на окне", [46, 1, 8, 14, 4, 16, 6, 8, 25]),
    ("ZZ top", [4, 1, 4, 28, 1]),
    ("a▁red", [35, 43]),
]


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
    ("a\u00a0b\u3000", [2, 4, 5, 1, 6, 1, 3]),  # no space there but those of ASCII
    ("", []),
])  # fmt: skip
def test_merges_are_done_by_rank_then_from_the_left(tokenizer: YouTokenToMe, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


@pytest.mark.parametrize(("text", "ids"), ITS_IDS)
def test_the_librarys_own_model_gives_the_librarys_own_ids(tmp_path: Path, text: str, ids: list[int]) -> None:
    # a line of the file for each part between bars
    (tmp_path / "its.model").write_text(ITS_OWN.replace("\n", "").replace("|", "\n") + "\n")
    tokenizer = load_tokenizer(tmp_path / "its.model")
    assert tokenizer.n_ids == 70 and tokenizer.encode(text) == [2, *ids, 3]


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
