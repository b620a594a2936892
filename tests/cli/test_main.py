import subprocess
import sys
from pathlib import Path

import pytest

from vqt2i import __version__
from vqt2i.cli import VERBS, main
from vqt2i.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_exits_0(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (verb, verb.replace("_", "-")):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        told = capsys.readouterr().out
        assert told.startswith(f"usage: vqt2i {verb}") and "--" in told


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []])
def test_the_help_lists_every_verb_with_a_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    told = capsys.readouterr().out
    rows = [line.split(maxsplit=1) for line in told.partition("commands:")[2].splitlines() if line.startswith("  ")]
    assert [verb for verb, _ in rows] == list(VERBS) and all(summary.endswith((".", "?")) for _, summary in rows)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"vqt2i {__version__}\n"


def test_an_unknown_verb_is_told_with_the_known_ones(fails) -> None:
    told = fails("paint", "x")
    assert "'paint'" in told and all(verb in told for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_exits_2(verb: str, fails) -> None:
    out = ["--out", "o"]
    needed = {
        "make_dataset": ["shapes"], "train_tokenizer": out, "make_pipeline": out, "benchmark": ["data"],
        "export": ["run", *out], "caption": ["a.png"], "edit": ["in.png", "--vary", "0.5"],
        "diagnose": ["model", "data"], "upscale": ["a.png"], "compare": ["a"], "gate": ["model"],
        "probe": ["model", "data"],
        "import_checkpoint": ["clip", "weights.pt", *out],
    }  # fmt: skip
    assert "--no-such-option" in fails(verb, *needed.get(verb, []), "--no-such-option")


@pytest.fixture
def run_of_evaluate(monkeypatch: pytest.MonkeyPatch):
    def set_run(error: BaseException) -> None:
        def run(args) -> None:
            raise error

        monkeypatch.setattr("vqt2i.cli.evaluate.run", run)

    return set_run


def test_user_errors_exit_2_and_interrupts_130_in_a_line(run_of_evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    run_of_evaluate(UserError("the thing is wrong"))
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err == "error: the thing is wrong\n"
    run_of_evaluate(KeyboardInterrupt())
    assert main(["evaluate"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_our_own_mistakes_keep_their_traceback(run_of_evaluate) -> None:
    run_of_evaluate(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["evaluate"])


def test_a_tool_does_what_its_verb_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--n", "0"]
    tool = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert main(["generate", "--n", "0"]) == tool.returncode == 2
    assert capsys.readouterr().err == tool.stderr != ""
