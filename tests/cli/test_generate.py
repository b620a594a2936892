import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vqt2i
from vqt2i.checkpoint import save_model
from vqt2i.cli import main
from vqt2i.generation.output import OutputFolder


@pytest.fixture
def draw(model_folders: Path, in_empty_folder: Path):
    """draw(*arguments) runs `generate` with the small pipeline in an empty folder; returns the exit code."""
    return lambda *arguments: main(["generate", "--model", str(model_folders), *map(str, arguments)])


def request_of(folder: str) -> dict:
    return json.loads((Path(folder) / "request.json").read_text(encoding="utf-8"))


def scores_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def contents_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_folder_is_printed_last_and_holds_the_pictures(draw, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("a red square", "蓝色正方形", "--rerank", 3, "--n", 2) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "4 pictures in outputs/0001, all of them in outputs/0001/grid.png"
    names = {path.name for path in Path("outputs/0001").iterdir()}
    assert names == {"request.json", "grid.png", "scores.jsonl", "000-00.png", "000-01.png", "001-00.png", "001-01.png"}


def test_equal_commands_draw_equal_pictures_and_other_seeds_others(draw) -> None:
    for seed, out in ((5, "a"), (5, "b"), (6, "c")):
        assert draw("a red square", "--seed", seed, "--n", 1, "--out", out) == 0
    a, b, c = (np.asarray(Image.open(Path(out) / "000-00.png")) for out in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_every_setting_reaches_the_pictures_metadata(draw) -> None:
    options = ["--guidance", 3, "--temperature", 0.9, "--top-k", 5, "--top-p", 0.8, "--seed", 7, "--rerank", 2]
    options += ["--guidance-interval", 0.25, 1, "--guidance-schedule", "linear", "--temperature-end", 0.5]
    options += ["--grid", 2, 5]
    options += ["--min-p", 0.1, "--jacobi-window", 4, "--negative", "a green square", "--mix", "蓝色正方形", 0.3]
    assert draw("x", *options, "--scorer", "caption", "--out", "o") == 0
    facts = json.loads(Image.open("o/000-00.png").text["vqt2i"])
    assert facts["settings"] == {
        "guidance": 3.0, "temperature": 0.9, "top_k": 5, "top_p": 0.8, "seed": 7, "rerank": 2, "scorer": "caption",
        "precision": "fp32", "grid": [2, 5],
        "guidance_interval": [0.25, 1.0], "guidance_schedule": "linear", "temperature_end": 0.5, "min_p": 0.1,
        "jacobi_window": 4, "negative": "a green square", "mix": ["蓝色正方形", 0.3],
    }  # fmt: skip
    assert set(facts["scores"]) == {"caption"}
    assert Image.open("o/000-00.png").size == (20, 8)


def test_the_scorer_that_was_used_is_recorded_when_none_was_chosen(draw) -> None:
    assert draw("x", "--rerank", 2, "--out", "o") == 0
    assert request_of("o")["settings"]["scorer"] == "both"


def test_without_a_prompt_the_pipelines_examples_are_drawn(draw) -> None:
    assert draw("--rerank", 2, "--out", "o") == 0
    assert request_of("o")["prompts"] == [line["prompt"] for line in scores_of("o")] == ["a red square"]


def test_as_many_are_kept_as_are_asked_for_up_to_four_by_default(draw) -> None:
    cases = [([], 4), (["--rerank", 3], 3), (["--rerank", 6], 4), (["--n", 5], 5), (["--rerank", 6, "--n", 6], 6)]
    for i, (options, n) in enumerate(cases):
        assert draw("x", *options, "--out", f"o{i}") == 0
        assert len(list(Path(f"o{i}").glob("000-*.png"))) == n


@pytest.mark.parametrize(
    "prompt", ["", "红" * 10_000, "🟥👩‍👩‍👧‍👦", "a\0b", "\udcff bytes that were no text", "two\nlines", "-- dashes"]
)
def test_hostile_prompts_are_drawn(draw, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("--rerank", 2, "--out", "o", "--", prompt) == 0
    (report,) = scores_of("o")
    told = capsys.readouterr().err
    assert ("did not fit" in told) == (report["n_truncated_ids"] > 0)
    if len(prompt) > 1000:
        assert report["n_truncated_ids"] > 9000 and "9" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rerank", 0], "--rerank: found 0"),
        (["--n", 0], "--n: found 0"),
        (["--n", -3], "--n: found -3"),
        (["--n", 5, "--rerank", 4], "--n 5: only 4 candidates"),
        (["--temperature", 0], "temperature: Input should be greater than 0"),
        (["--temperature", -1], "temperature"),
        (["--top-p", 2], "top_p: Input should be less than or equal to 1"),
        (["--top-k", 0], "top_k"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "-1"], "guidance"),
        (["--guidance-interval", "0.5", "0.2"], "guidance_interval: found 0.5 to 0.2"),
        (["--guidance-schedule", "quadratic"], "--guidance-schedule: invalid choice: 'quadratic'"),
        (["--temperature-end", 0], "temperature_end"),
        (["--min-p", 1.5], "min_p: Input should be less than or equal to 1"),
        (["--jacobi-window", 0], "jacobi_window"),
        (["--mix", "y", "half"], "--mix: found a share of 'half'"),
        (["--mix", "y", 1], "share of 'y': found 1"),
        (["--mix", "red " * 20, 0.5], "the model reads 12"),
        (["--negative", "red " * 20], "the model reads 12"),
        (["--negative", "y", "--guidance", 1], "negative prompt 'y': guidance 1 from 0 to 1"),
        (["--guidance", "much"], "--guidance: invalid float value: 'much'"),
        (["--scorer", "beauty", "--rerank", 2], "--scorer: invalid choice: 'beauty'"),
        (["--scorer", "clip"], "--scorer clip: nothing is ranked without --rerank"),
    ],
)
def test_numbers_out_of_range_are_told_in_a_line(
    fails, model_folders: Path, in_empty_folder: Path, options: list, told: str
) -> None:
    assert told in fails("generate", "x", "--model", model_folders, *options)
    assert list(in_empty_folder.iterdir()) == []


def test_a_model_that_is_not_there_or_is_none_is_told(fails, in_empty_folder: Path, model_folders: Path) -> None:
    (in_empty_folder / "empty").mkdir()
    assert "none: no such folder" in fails("generate", "x", "--model", "none")
    assert "empty/card.json" in fails("generate", "x", "--model", "empty")
    told = fails("generate", "x", "--model", model_folders / "vq")
    assert "vq: a model of kind 'vqgan'; expected a pipeline folder or a GPT run" in told


def test_an_out_that_is_a_file_is_told_before_drawing(fails, in_empty_folder: Path, model_folders: Path) -> None:
    (in_empty_folder / "file").touch()
    assert "--out file" in fails("generate", "x", "--model", model_folders, "--out", "file")


def test_passes_saved_are_told_and_written(draw, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("x", "--n", 2, "--out", "plain") == 0
    assert "passes of the GPT" not in capsys.readouterr().err
    assert [c["n_passes"] for c in scores_of("plain")[0]["candidates"]] == [16, 16]
    assert draw("x", "--n", 2, "--jacobi-window", 8, "--top-k", 1, "--out", "o") == 0
    n_passes = [c["n_passes"] for c in scores_of("o")[0]["candidates"]]
    assert max(n_passes) <= 16
    assert f"{sum(n_passes) / 2:.1f} passes of the GPT for the 16 tokens of an image" in capsys.readouterr().err


@pytest.fixture
def forty(in_empty_folder: Path) -> Path:
    """A file of 40 prompts: more than one grid of them and, 5 candidates each, more than are drawn at once."""
    path = in_empty_folder / "prompts.txt"
    path.write_text("".join(f"a red square {i}\n" for i in range(40)), encoding="utf-8")
    return path


LONG = ["--rerank", 5, "--n", 2, "--scorer", "caption"]


def test_a_file_of_prompts_gives_the_pictures_of_the_same_prompts_on_the_command_line(draw, forty: Path) -> None:
    assert draw("--prompts", forty, *LONG, "--out", "a") == 0
    assert draw(*forty.read_text().splitlines(), *LONG, "--out", "b") == 0
    assert contents_of("a") == contents_of("b")
    assert len(scores_of("a")) == 40 and len(list(Path("a").glob("???-??.png"))) == 80


def test_many_prompts_get_several_grids_of_bounded_size(draw, forty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("--prompts", forty, *LONG, "--out", "a") == 0
    assert capsys.readouterr().out == "80 pictures in a, all of them in a/grid-000.png to grid-001.png\n"
    assert [Image.open(path).height for path in sorted(Path("a").glob("grid*"))] == [32 * 168 + 8, 8 * 168 + 8]


@pytest.mark.parametrize("after", [0, 1, 13, 33])
def test_a_job_that_was_stopped_goes_on_and_ends_as_if_it_never_had(
    draw, forty: Path, after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw("--prompts", forty, *LONG, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        write = OutputFolder.write

        def stopped_write(self: OutputFolder, group: list, *facts: object) -> None:
            if group[0].prompt_index == after:
                raise KeyboardInterrupt
            write(self, group, *facts)

        patch.setattr(OutputFolder, "write", stopped_write)
        assert draw("--prompts", forty, *LONG, "--out", "o") == 130
    told = capsys.readouterr().err
    assert f"{after} of 40 prompts are in o; the same command with --out o goes on" in told
    assert len(list(Path("o").glob("???-??.png"))) == 2 * after
    assert bool(list(Path("o").glob("grid*"))) == (after > 0)
    assert draw("--prompts", forty, *LONG, "--out", "o") == 0
    assert contents_of("o") == contents_of("whole")


def test_a_finished_job_draws_nothing_more(draw, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert draw("x", "y", "--n", 1, "--out", "o") == 0
    told = capsys.readouterr()
    assert "o: 2 of 2 prompts are there" in told.err and "drawing: 0 images" in told.err
    assert len(set(told.out.splitlines())) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x", "z"], "other prompts (2, now 2; number 2 is 'y', now 'z')"),
        (["x", "y", "w"], "other prompts (2, now 3; number 3 is none, now 'w')"),
        (["x", "y", "--seed", 1], "seed 0, now 1"),
        (["x", "y", "--n", 2], "n 1, now 2"),
        (["x", "y", "--negative", "z", "--mix", "z", 0.5], "negative None, now z; mix None, now ['z', 0.5]"),
        (["x", "y", "--min-p", 0.5, "--jacobi-window", 8], "min_p None, now 0.5; jacobi_window None, now 8"),
        (["x", "y", "--temperature", 0.5, "--rerank", 2], "temperature 1.0, now 0.5; rerank None, now 2"),
    ],
)
def test_a_folder_of_other_prompts_or_settings_is_refused_with_the_difference(
    draw, fails, model_folders: Path, arguments: list, told: str
) -> None:
    assert draw("x", "y", "--n", 1, "--out", "o") == 0
    before = contents_of("o")
    given = arguments if "--n" in arguments else [*arguments, "--n", 1]
    assert told in fails("generate", "--model", model_folders, "--out", "o", *given)
    assert contents_of("o") == before


def test_a_folder_of_other_weights_is_refused(draw, fails, model_folders: Path, tiny_clip) -> None:
    assert draw("x", "--n", 1, "--out", "o") == 0
    shutil.copytree(model_folders, "p")
    with torch.no_grad():
        tiny_clip.no_text.add_(1)
    save_model(Path("p/clip"), tiny_clip, tiny_clip.config, {"kind": "clip"})
    assert "clip model " in fails("generate", "--model", "p", "--out", "o", "x", "--n", 1)


def test_a_folder_that_holds_something_else_is_refused_untouched(draw, fails, model_folders: Path) -> None:
    Path("o").mkdir()
    Path("o/notes").touch()
    assert "o: exists already" in fails("generate", "x", "--model", model_folders, "--out", "o")
    assert set(contents_of("o")) == {"notes"}


@pytest.mark.parametrize(
    ("content", "arguments", "told"),
    [
        (b"", [], "no prompt in it"),
        (None, [], "p.txt: cannot be read"),
        (b"\xff\xfe\0", [], "not UTF-8"),
        (b"a\n", ["b"], "--prompts p.txt: prompts are given too ('b')"),
    ],
)
def test_bad_prompt_files_are_told_before_anything_is_loaded(
    fails, in_empty_folder: Path, content: bytes | None, arguments: list, told: str
) -> None:
    if content is not None:
        Path("p.txt").write_bytes(content)
    assert told in fails("generate", "--model", "not loaded", "--prompts", "p.txt", *arguments)
    assert not Path("outputs").exists()


def test_prompts_that_are_too_long_are_told_a_few_times_only(draw, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(*["red " * 50] * 5, "--n", 1) == 0
    told = capsys.readouterr().err
    assert told.count("did not fit") == 3 and "so it was with 2 more prompts" in told


def test_a_preview_is_there_while_it_draws(
    draw, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, seen = OutputFolder.write, []

    def write_and_look(self: OutputFolder, group: list, *facts: object) -> None:
        seen.append((self.path / "preview.png").is_file())
        write(self, group, *facts)

    monkeypatch.setattr(OutputFolder, "write", write_and_look)
    assert draw("x", "--n", 1, "--preview", "--out", "o") == 0
    assert seen == [True] and "preview: o/preview.png" in capsys.readouterr().err
    assert draw("x", "--n", 1, "--out", "plain") == 0
    assert contents_of("o") == contents_of("plain")


@pytest.fixture
def start(model_folders: Path, in_empty_folder: Path):
    """start(*arguments): `generate` as a process of its own, in the folder of `draw`."""
    started = []

    def run(*arguments: object) -> subprocess.Popen:
        command = [Path(vqt2i.__file__).parents[1] / "tools" / "generate.py", "--model", model_folders, *arguments]
        started.append(subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_write_the_folder_of_one(draw, start, forty: Path) -> None:
    assert draw("--prompts", forty, *LONG, "--out", "one") == 0
    process = start("--prompts", forty, *LONG, "--devices", 2, "--out", "two")
    out, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert out == "80 pictures in two, all of them in two/grid-000.png to grid-001.png\n"
    assert "drawing: 200 images in" in told and told.count("drawing:") == told.count("pipeline:") == 1
    assert contents_of("one") == contents_of("two")


def processes_of(process: subprocess.Popen, n: int) -> list[int]:
    """The ids of its n processes, in order, once each of them has begun to leave something in the folder o."""
    end = time.monotonic() + 300
    while not (Path("o/finished").is_dir() and Path("o/scores.jsonl").is_file()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == n
    return [int(child) for child in children]


def test_a_killed_process_and_an_interrupt_end_all_and_any_number_of_processes_goes_on(
    draw, start, in_empty_folder: Path
) -> None:
    prompts = in_empty_folder / "prompts.txt"
    prompts.write_text("".join(f"a red square {i}\n" for i in range(24)), encoding="utf-8")
    job = ["--prompts", prompts, "--rerank", 32, "--n", 1, "--scorer", "caption"]

    killed = start(*job, "--devices", 2, "--out", "o")
    ranks = processes_of(killed, 2)
    os.kill(ranks[1], signal.SIGKILL)
    _, told = killed.communicate(timeout=60)
    assert killed.returncode == 1 and "process 1 of 2 was killed by SIGKILL" in told and "Traceback" not in told
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)

    drawn = len(list(Path("o").glob("???-00.png")))
    shutil.rmtree("o/finished")  # to see when the next has begun
    interrupted = start(*job, "--devices", 2, "--out", "o")
    processes_of(interrupted, 2)
    interrupted.send_signal(signal.SIGINT)
    _, told = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, told
    assert told.count("interrupted") == 1 and "Traceback" not in told
    assert "of 24 prompts are in o; the same command with --out o goes on" in told
    assert drawn <= len(list(Path("o").glob("???-00.png"))) < 24

    assert draw(*job, "--out", "o") == 0 and draw(*job, "--out", "whole") == 0
    assert contents_of("o") == contents_of("whole")


def test_an_error_of_all_processes_is_told_once(start) -> None:
    process = start("x", "--devices", 2, "--memory", 1e-6)
    out, told = process.communicate(timeout=600)
    assert process.returncode == 2 and told.count("error: ") == 1 and "an image needs" in told
    assert "Traceback" not in told and out == "" and not list(Path("outputs").rglob("*.png"))


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--devices", 0], "--devices: found 0"), (["--memory", 0], "--memory: found 0.0, expected more than 0")],
)
def test_machines_that_make_no_sense_are_told_in_a_line(
    fails, model_folders: Path, in_empty_folder: Path, options: list, told: str
) -> None:
    assert told in fails("generate", "x", "--model", model_folders, *options)
    assert list(in_empty_folder.iterdir()) == []
