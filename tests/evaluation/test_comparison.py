import json
from pathlib import Path

import pytest

from vqt2i.cli import main
from vqt2i.errors import DataError
from vqt2i.evaluation.comparison import compare, section_of
from vqt2i.evaluation.result import Measured, Result, Row, differences, read_result, write_result
from vqt2i.origin import Origin

ORIGIN = Origin(time="", command="python tools/evaluate.py", git_commit=None, versions={}, machine={})


def result(model: str, value: float, guidance: float = 2.0, candidates: int = 4) -> Result:
    rows = [
        Row("right", value / 2, 0.1, 0.9, 10, {"group": "all prompts", "chosen by": "random", "of": 1}),
        Row("right", value - 0.1, 0.1, 0.9, 10, {"group": "all prompts", "chosen by": "clip", "of": candidates // 2}),
        Row("right", value, 0.1, 0.9, 10, {"group": "all prompts", "chosen by": "clip", "of": candidates}),
        Row("seconds", 3.0, None, None, 4, {"step": "drawing"}),
    ]
    protocol = {"sampling": {"guidance": guidance, "top_k": None}, "candidates": candidates}
    alignment = Measured(protocol=protocol, rows=tuple(rows), seconds=1.0, origin=ORIGIN)
    psnr = Measured(protocol={"n": 5}, rows=(Row("psnr", 30 * value, 20.0, 40.0, 5, {}),), seconds=1.0, origin=ORIGIN)
    return Result(
        model=model, fingerprints={"gpt": model * 8}, measures={"alignment": alignment, "reconstruction": psnr}
    )


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_result(tmp_path, result("a", 0.5))
    assert read_result(tmp_path) == result("a", 0.5)
    row = json.loads((tmp_path / "result.json").read_text())["measures"]["reconstruction"]["rows"][0]
    assert row == {"name": "psnr", "value": 15, "low": 20, "high": 40, "n": 5, "where": {}}


@pytest.mark.parametrize(
    ("content", "told"), [(None, "cannot be read"), ("{", "not a result"), ('{"model": "x"}', "fingerprints")]
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(DataError, match=told):
        read_result(tmp_path)


def test_differences_are_told_by_name_wherever_they_are() -> None:
    first = {"a": {"b": 1, "c": None}, "d": [1, 2], "e": "f" * 64}
    assert differences(first, first) == []
    other = {"a": {"b": 2, "c": 3}, "d": [1, 2], "e": "0" * 64}
    assert differences(first, other) == ["a.b 1, 2", "a.c none, 3", "e ffffffff, 00000000"]


def test_equal_protocols_stand_side_by_side_and_others_are_marked() -> None:
    alike = compare([result("a", 0.5), result("b", 0.75)])
    assert [(c.measure, c.differences) for c in alike] == [("alignment", ()), ("reconstruction", ())]
    section = section_of(alike[0], ["a", "b"])
    assert section.rows == [
        ("all right, % · all prompts · random", "25.0 (10.0 to 90.0)", "37.5 (10.0 to 90.0)"),
        ("all right, % · all prompts · clip", "50.0 (10.0 to 90.0)", "75.0 (10.0 to 90.0)"),
    ]
    unlike = compare([result("a", 0.5), result("b", 0.5, guidance=3.0, candidates=8)])
    assert unlike[0].differences == ("sampling.guidance 2.0, 3.0", "candidates 4, 8") and not unlike[1].differences
    marked = section_of(unlike[0], ["a", "b"])
    assert marked.title == "≠ alignment" and "sampling.guidance 2.0, 3.0" in marked.remark
    assert all("" not in row for row in marked.rows)


def test_the_command_refuses_different_protocols_with_what_differs(
    tmp_path: Path, fails, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, found in (("a", result("a", 0.5)), ("b", result("b", 0.75)), ("c", result("c", 0.5, guidance=3.0))):
        (tmp_path / name).mkdir()
        write_result(tmp_path / name, found)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["compare", a, b]) == 0
    assert "37.5 (" in capsys.readouterr().out
    told = fails("compare", a, b, c)
    assert "alignment: sampling.guidance 2.0, 3.0" in told and "reconstruction" not in told and "--anyway" in told
    assert main(["compare", a, c, "--measure", "reconstruction"]) == 0
    assert "≠" not in capsys.readouterr().out
    assert main(["compare", a, c, "--anyway"]) == 0
    told = capsys.readouterr().out
    assert "≠ alignment (NOT ALIKE: sampling.guidance 2.0, 3.0)" in told and "\nreconstruction" in told
    assert "fidelity: is not in all results" in fails("compare", a, b, "--measure", "fidelity")
    assert "one result" in fails("compare", a)
    assert "cannot be read" in fails("compare", a, tmp_path)
