import json
from pathlib import Path
from typing import get_args

import pytest

from vqt2i.data.shapes.scene import Colour, Shape
from vqt2i.errors import CheckpointError
from vqt2i.text import TextTokenizer, pad_texts

SHIPPED = Path(__file__).parents[2] / "tokenizers" / "bilingual.model"
COLOURS, SHAPES = get_args(Colour), get_args(Shape)


@pytest.fixture(scope="module")
def shipped() -> TextTokenizer:
    return TextTokenizer.load(SHIPPED)


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle left of 2 blue squares",
        "一个小的红色圆形在蓝色正方形的左边",
        "ein größerer kreis über der tür",
        "маленький красный круг",
        "دائرة حمراء صغيرة",
        "빨간 원",
        "赤い丸と青い四角",
        "🟥 next to 👩‍👩‍👧‍👦 and 🏳️‍🌈",
        "a+b=c; {x: [1, 2]} \\ \" ' `",
        "",
    ],
)
def test_decoding_the_ids_gives_the_text_back(shipped: TextTokenizer, tiny_text: TextTokenizer, text: str) -> None:
    for tokenizer in (shipped, tiny_text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.n_ids for i in ids)


def test_the_empty_text_has_no_ids_and_no_text_has_begin_or_end_marks(shipped: TextTokenizer) -> None:
    assert shipped.encode("") == []
    assert not {1, 2} & set(shipped.encode("a red circle"))


def test_case_and_full_width_letters_are_folded(shipped: TextTokenizer) -> None:
    assert shipped.encode("A Red CIRCLE") == shipped.encode("a red circle") == shipped.encode("ａ ｒｅｄ circle")


def test_nothing_after_a_nul_is_lost_and_lone_surrogates_do_no_harm(shipped: TextTokenizer) -> None:
    assert shipped.decode(shipped.encode("red\0circle")) == "red circle"
    assert shipped.decode(shipped.encode("red \ud800 circle")) == "red ? circle"
    assert shipped.encode("\0") == []


def test_a_text_of_10000_characters_is_encoded_whole(shipped: TextTokenizer) -> None:
    text = ("红" * 9 + "🟥") * 1000
    assert shipped.decode(shipped.encode(text)) == text


def test_no_id_of_ours_is_the_unknown_one(shipped: TextTokenizer, tiny_text: TextTokenizer) -> None:
    for tokenizer in (shipped, tiny_text):
        assert 0 not in tokenizer.encode("ⵣ 𓀀 \U0010fffd ~ zażółć")


def test_han_characters_are_single_pieces(shipped: TextTokenizer, tiny_text: TextTokenizer) -> None:
    assert len(shipped.encode("红色正方形")) == 1 + 5  # the mark of a word's start, then one id each
    words = ["红色", "红色正方形", "正方形红色"]
    assert [len(tiny_text.encode(word)) for word in words] == [3, 6, 6]
    assert sorted(tiny_text.encode("红色正方形")) == sorted(tiny_text.encode("正方形红色"))


def test_the_shipped_model_is_the_one_its_card_names(shipped: TextTokenizer) -> None:
    card = json.loads(SHIPPED.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["fingerprint"] == shipped.fingerprint
    assert card["n_ids"] == shipped.n_ids
    assert card["command"].startswith("python tools/train_tokenizer.py ")


@pytest.mark.parametrize("word", [*COLOURS, *SHAPES])
def test_the_shipped_model_never_splits_a_colour_or_a_shape(shipped: TextTokenizer, word: str) -> None:
    alone = shipped.encode(word)
    assert len(alone) == 1
    assert alone[0] in shipped.encode(f"a big {word} thing")


def test_a_file_a_folder_and_their_errors(tmp_path: Path, tiny_text: TextTokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"none\.model: No such file"):
        TextTokenizer.load(tmp_path / "none.model")
    with pytest.raises(CheckpointError, match=r"expected one \.model file in it, found 0"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "a.model").write_bytes(tiny_text.model)
    assert TextTokenizer.load(tmp_path).fingerprint == tiny_text.fingerprint
    (tmp_path / "b.model").write_bytes(tiny_text.model)
    with pytest.raises(CheckpointError, match="found 2"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.model: not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "a.model")


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(SHIPPED.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "a.model")


def test_texts_are_padded_with_zeros_and_cut_to_the_length() -> None:
    batch = pad_texts([[5, 6], [], [1, 2, 3, 4]], 3)
    assert batch.ids_BS.tolist() == [[5, 6, 0], [0, 0, 0], [1, 2, 3]]
    assert batch.n_ids_B.tolist() == [2, 0, 3]
