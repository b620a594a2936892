import json
from pathlib import Path

import pytest

from vqt2i.config import build_config
from vqt2i.errors import ConfigError, DataError
from vqt2i.text import TextTokenizer
from vqt2i.text.train import TextTokenizerConfig, read_lines, save_text_tokenizer, train_text_tokenizer

LINES = [f"a {size} {colour} star, 红色圆形" for size in ("small", "large") for colour in ("red", "green", "blue")]
CONFIG = TextTokenizerConfig(vocabulary_size=320)


def test_training_is_deterministic_and_ignores_repeated_lines() -> None:
    first = train_text_tokenizer(LINES, CONFIG)
    assert train_text_tokenizer(LINES, CONFIG).model == first.model
    assert train_text_tokenizer(LINES * 3, CONFIG).model == first.model
    assert train_text_tokenizer(["\n".join(LINES)], CONFIG).fingerprint == first.fingerprint


def test_a_frequent_word_is_one_piece_even_at_the_end_of_every_line() -> None:
    tokenizer = train_text_tokenizer([f"{line} ending" for line in LINES], CONFIG)
    assert len(tokenizer.encode("ending")) == len(tokenizer.encode("star")) == 1


def test_the_vocabulary_is_at_most_what_was_asked_for_and_smaller_for_a_small_corpus() -> None:
    assert 256 < train_text_tokenizer(LINES, CONFIG).n_ids <= 320
    assert train_text_tokenizer(LINES, TextTokenizerConfig(vocabulary_size=4000)).n_ids < 1000


@pytest.mark.parametrize("texts", [[], [""], ["  \n\t"]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no captions"):
        train_text_tokenizer(texts, CONFIG)


def test_a_vocabulary_too_small_for_the_letters_is_an_error_in_one_line() -> None:
    with pytest.raises(DataError, match="ask for") as error:
        train_text_tokenizer(LINES, TextTokenizerConfig(vocabulary_size=100))
    assert len(str(error.value).splitlines()) == 1


def test_texts_that_are_hard_to_train_on_do_no_harm() -> None:
    tokenizer = train_text_tokenizer([*LINES, "x" * 50_000, "\0 red", "a\tb\t3", "🟥🟦"], CONFIG)
    assert tokenizer.decode(tokenizer.encode("a red star")) == "a red star"


@pytest.mark.parametrize("values", [{"vocabulary_size": 0}, {"character_coverage": 0.5}, {"vocab": 3}])
def test_settings_out_of_range_are_errors(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        build_config(TextTokenizerConfig, values, "train_tokenizer")


def test_the_saved_model_loads_and_its_card_holds_the_facts(tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(LINES, CONFIG)
    save_text_tokenizer(tokenizer, tmp_path / "deep" / "our.model", {"command": "x"})
    assert TextTokenizer.load(tmp_path / "deep").fingerprint == tokenizer.fingerprint
    card = json.loads((tmp_path / "deep" / "our.json").read_text())
    assert card == {
        "kind": "text", "fingerprint": tokenizer.fingerprint, "n_ids": tokenizer.n_ids, "command": "x",
    }  # fmt: skip


def test_lines_of_a_file_that_is_missing_or_not_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("红\nb\n", encoding="utf-8")
    assert read_lines(tmp_path / "a.txt") == ["红", "b"]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    for name in ("b.txt", "none.txt"):
        with pytest.raises(DataError, match=name):
            read_lines(tmp_path / name)


def test_merges_are_left_out_as_the_seed_says_and_the_text_stays() -> None:
    tokenizer = train_text_tokenizer(LINES, CONFIG.model_copy(update={"model_type": "bpe"}))
    assert tokenizer.is_bpe and not train_text_tokenizer(LINES, CONFIG).is_bpe
    text = "a small red star, 红色圆形"
    splits = [tokenizer.sample(text, 0.1, seed) for seed in range(40)]
    assert splits == [tokenizer.sample(text, 0.1, seed) for seed in range(40)]
    assert {tokenizer.decode(ids) for ids in splits} == {text}
    assert len(set(map(tuple, splits))) > 5 and tokenizer.encode(text) in splits
    # of merges that could be made about a tenth are not
    longer = sum(len(ids) > len(tokenizer.encode(text)) for ids in splits)
    assert 10 < longer < 40
    assert tokenizer.sample(text, 0.0, 3) == tokenizer.encode(text) == min(splits, key=len)
