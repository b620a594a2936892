from pathlib import Path

import pytest

from vqt2i.errors import PromptError
from vqt2i.generation.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "a red square\n蓝色正方形\n", ["a red square", "蓝色正方形"]),
        ("p.txt", "no line end", ["no line end"]),
        ("p.txt", "\ufeffmark\r\nof Windows\r\n", ["mark", "of Windows"]),
        ("p.txt", "\n  one  \n\n \t \ntwo\n\n", ["one", "two"]),
        ("p.txt", 'a sign "stop"\ntab\tin a prompt\n', ['a sign "stop"', "tab\tin a prompt"]),
        ("p.txt", "Prompt\na word like any other\n", ["Prompt", "a word like any other"]),
        ("p.txt", "one\u2028prompt\x0bof\x85a line", ["one\u2028prompt\x0bof\x85a line"]),
        ("p.txt", "same\nsame\n", ["same", "same"]),
        ("Parti.tsv", 'Prompt\tCategory\na "cat"\tAnimals\n"dog\tAnimals\n', ['a "cat"', '"dog']),
        ("parti.txt", "Prompt\tCategory\na cat\tAnimals\n", ["a cat"]),
        ("p.TSV", "a cat\tAnimals\na dog\n", ["a cat", "a dog"]),
        ("p.tsv", "Prompt\na cat\n", ["a cat"]),
    ],
)
def test_prompts_are_lines_or_the_first_column_of_a_table(
    tmp_path: Path, name: str, content: str, prompts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no prompt in it"),
        (b" \n\n\t\n", "no prompt in it"),
        (b"Prompt\tCategory\n", "no prompt in it"),
        (b"\x89PNG\r\n\x1a\n\0\0", "byte 0 is not UTF-8"),
        (b"a\0b\n", "zero bytes"),
        ("a red square".encode("utf-16"), "not UTF-8"),
        ("黄色".encode("gb18030"), "not UTF-8"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_by_name(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(PromptError, match=rf"p\.txt: .*{told}"):
        read_prompts(tmp_path / "p.txt")


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"none\.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path)
