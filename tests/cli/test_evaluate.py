import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vqt2i
from vqt2i.cli import main
from vqt2i.data.shards import DataSet
from vqt2i.evaluation.result import Result, Row, read_result
from vqt2i.generation.output import OutputFolder

SMALL = ["--split", "train", "--n-prompts", 20, "--rerank", 2]


@pytest.fixture
def evaluate(model_folders: Path, tiny_dataset: DataSet, in_empty_folder: Path):
    """evaluate(*options): the small pipeline and data set in an empty folder, with small settings; the exit code."""
    return lambda *options: main(["evaluate", str(model_folders), str(tiny_dataset.folder), *map(str, options)])


def rows_of(result: Result, measure: str) -> list[Row]:
    return [row for row in result.measures[measure].rows if row.name != "seconds"]


def test_every_measure_comes_with_its_protocol_a_page_and_pictures(
    evaluate, model_folders: Path, tiny_dataset: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    measures = "alignment,fidelity,reconstruction,sweep"
    assert evaluate(*SMALL, "--measure", measures, "--sweep", "guidance=1,2.5", "top_k=3", "--out", "o") == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == "See o/report.html" and "R-precision, %" in told and "PSNR, dB" in told
    names = {path.name for path in Path("o").iterdir()}
    assert names == {"result.json", "report.html", "samples", "sweep", "reconstructions.png"}
    assert {path.name for path in Path("o/sweep").iterdir()} == {"guidance-1-top_k-3", "guidance-2.5-top_k-3"}
    assert len(list(Path("o/samples").glob("???-??.png"))) == 40
    result = read_result(Path("o"))
    assert list(result.measures) == measures.split(",")
    values = {row.name for row in rows_of(result, "alignment")}
    assert values == {"clip_score", "caption_score", "r_precision"}  # 16 px are too small for the oracle
    assert {row.where["of"] for row in rows_of(result, "alignment")} == {1, 2}
    assert {row.where["chosen by"] for row in rows_of(result, "alignment")} == {"random", "clip", "caption", "both"}
    steps = [row.where["step"] for row in result.measures["alignment"].rows if row.name == "seconds"]
    assert steps == ["drawing", "clip", "caption"]
    fidelity = result.measures["fidelity"].protocol
    assert fidelity["prompts"]["source"] == "captions" and fidelity["prompts"]["n"] == 20
    assert fidelity["candidates"] == 2 and fidelity["ranked_by"] == "both" and fidelity["seed"] == 0
    assert fidelity["sampling"]["guidance"] == 2 and fidelity["precision"] == "fp32"
    assert fidelity["data"] == {
        "fingerprint": tiny_dataset.fingerprint, "split": "train", "n": 24, "resize": "centre square, Lanczos to 16 px",
    }  # fmt: skip
    assert fidelity["features"]["extractor"] == "vqt2i-clip-image-tower"
    origin = result.measures["sweep"].origin
    assert origin.command.startswith("python ") and {"torch", "torch-fidelity"} <= origin.versions.keys()
    cells = {tuple(row.where.items()) for row in rows_of(result, "sweep")}
    assert cells == {(("guidance", 1.0), ("top_k", 3.0)), (("guidance", 2.5), ("top_k", 3.0))}
    assert result.fingerprints.keys() == {"text", "vq", "gpt", "clip"}


def test_the_nearest_training_pictures_stand_beside_what_was_drawn(evaluate) -> None:
    assert evaluate(*SMALL, "--measure", "memorisation", "--out", "o") == 0
    rows = {(row.name, row.where["pictures"]): row for row in rows_of(read_result(Path("o")), "memorisation")}
    assert rows.keys() == {("nearest_rmse", "drawn"), ("nearest_rmse", "held out"), ("own_picture", "drawn")}
    assert rows["nearest_rmse", "drawn"].n == rows["own_picture", "drawn"].n == 20
    assert len(list(Path("o/nearest").iterdir())) == 20
    assert f"<td>20, {rows['nearest_rmse', 'held out'].n}<" in Path("o/report.html").read_text()
    assert Path("o/report.html").read_text().count("<figure><img") == 20


def test_a_job_that_was_stopped_goes_on_and_what_is_measured_stays(
    evaluate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*SMALL, "--measure", "alignment", "--out", "whole") == 0
    with monkeypatch.context() as patch:
        write = OutputFolder.write

        def stopped_write(self: OutputFolder, group: list, *facts: object) -> None:
            if group[0].prompt_index == 13:
                raise KeyboardInterrupt
            write(self, group, *facts)

        patch.setattr(OutputFolder, "write", stopped_write)
        assert evaluate(*SMALL, "--measure", "alignment", "--out", "o") == 130
    assert "13 of 20 prompts are in o/samples; the same command with --out o goes on" in capsys.readouterr().err
    assert evaluate(*SMALL, "--measure", "alignment", "--out", "o") == 0
    whole = read_result(Path("whole"))
    assert rows_of(read_result(Path("o")), "alignment") == rows_of(whole, "alignment")
    first = read_result(Path("o")).measures["alignment"]
    capsys.readouterr()
    assert evaluate(*SMALL, "--measure", "alignment,reconstruction", "--out", "o") == 0
    assert "alignment: is there" in capsys.readouterr().err
    again = read_result(Path("o")).measures
    assert again["alignment"] == first and again.keys() == {"alignment", "reconstruction"}


def test_two_processes_find_what_one_finds(evaluate, model_folders: Path, tiny_dataset: DataSet) -> None:
    options = [*SMALL, "--measure", "alignment,sweep", "--sweep", "guidance=1,2"]
    assert evaluate(*options, "--out", "one") == 0
    tool = Path(vqt2i.__file__).parents[1] / "tools" / "evaluate.py"
    command = [sys.executable, tool, model_folders, tiny_dataset.folder, *options, "--devices", 2, "--out", "two"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "See two/report.html"
    one, two = read_result(Path("one")), read_result(Path("two"))
    for measure in ("alignment", "sweep"):
        assert rows_of(one, measure) == rows_of(two, measure)
        assert one.measures[measure].protocol == two.measures[measure].protocol


def test_prompts_come_from_a_table_and_another_judge_judges(
    model_folders: Path, in_empty_folder: Path, fails, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.tsv").write_text("Prompt\tCategory\na red square\tx\n蓝色正方形\ty\nan astronaut\tz\n", encoding="utf-8")
    command = ["evaluate", str(model_folders), "--prompts", "p.tsv", "--rerank", "1", "--out", "o"]
    assert main(command) == 0
    alignment = read_result(Path("o")).measures["alignment"]
    assert alignment.protocol["prompts"]["source"] == "file" and alignment.protocol["prompts"]["n"] == 3
    assert alignment.protocol["ranked_by"] is None and {row.where["of"] for row in alignment.rows} == {1}
    assert not [row for row in alignment.rows if row.name == "right"]  # an astronaut is no shape
    shutil.copytree(model_folders, "other")
    assert "judge text " in fails(*command, "--judge", "shapes32")
    assert main([*command[:-1], "p", "--judge", "shapes32"]) == 0
    judged = read_result(Path("p")).measures["alignment"]
    assert judged.protocol["judge"] != alignment.protocol["judge"]
    assert "judge.text " in fails("compare", "o", "p")


def test_the_oracle_judges_drawn_prompts(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kinds", "single_seen,full_seen", "--n-prompts", "2", "--rerank", "1"]
    assert main(["evaluate", "shapes32", *options]) == 0
    rows = read_result(Path("evaluations/0001")).measures["alignment"].rows
    found = {(row.name, row.where["group"]): row for row in rows}
    assert {"right", "count", "colour", "shape"} <= {name for name, _ in found}
    assert found["right", "prompts: single_seen"].n == 2 and found["right", "all prompts"].n == 4
    assert "single_seen" in capsys.readouterr().out


def test_captions_of_rendered_scenes_are_judged(in_empty_folder: Path) -> None:
    options = ["--measure", "captions", "--kinds", "single_seen", "--n-prompts", "2", "--out", "o"]
    assert main(["evaluate", "shapes32", *options]) == 0
    captions = read_result(Path("o")).measures["captions"]
    assert {row.name for row in captions.rows} == {"right", "colour_shape", "sentence"}
    assert captions.protocol["n_scenes"] == 2 and captions.protocol["how"]["n_beams"]


def test_results_of_another_model_are_not_mixed_in(evaluate, model_folders: Path, fails) -> None:
    assert evaluate("--split", "train", "--measure", "reconstruction", "--out", "o") == 0
    before = Path("o/result.json").read_bytes()
    assert "o: holds results of another model (" in fails("evaluate", "shapes32", "--out", "o")
    assert Path("o/result.json").read_bytes() == before
    Path("notes").mkdir()
    Path("notes/x").touch()
    assert "notes: exists already" in fails("evaluate", model_folders, "--out", "notes")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--measure", "beauty"], "measures.0: Input should be 'reconstruction', 'fidelity'"),
        (["--measure", "reconstruction"], "reconstruction: needs a data set"),
        (["--prompts", "captions"], "prompts from captions: needs a data set"),
        (["--prompts", "none.txt"], "none.txt: cannot be read"),
        (["--kinds", "four"], "no prompts of kind 'four'"),
        (["--n-prompts", 1], "number of prompts: found 1"),
        (["--n-prompts", 0], "n_prompts"),
        (["--rerank", 0], "candidates"),
        (["--devices", 0], "--devices: found 0"),
        (["--measure", "sweep", "--sweep", "beauty=1"], "sweep: beauty: unknown key"),
        (["--measure", "sweep", "--sweep", "guidance=much"], "sweep.guidance.0"),
        (["--measure", "sweep", "--sweep", "temperature=0"], "sweep: temperature"),
        (["--inception", "none.pth"], "none.pth: no such file; expected torch-fidelity's Inception"),
        (["--judge", "nobody"], "nobody: no such folder"),
        (["--measure", "captions"], "shapes: are drawn with 32, 64, 128 px, the model reads 16 px"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(
    fails, model_folders: Path, in_empty_folder: Path, options: list, told: str
) -> None:
    assert told in fails("evaluate", model_folders, *options)
    assert list(in_empty_folder.iterdir()) == []


def test_too_few_pictures_are_told_before_drawing(fails, model_folders: Path, tiny_dataset, in_empty_folder) -> None:
    model = [model_folders, tiny_dataset.folder]
    assert "7 images of split 'val' are to be compared with; expected 20" in fails("evaluate", *model)
    told = fails("evaluate", *model, "--split", "train", "--n-prompts", 3)
    assert "fidelity: pictures of 3 prompts, expected 20 or more" in told
    assert "no split 'test'" in fails("evaluate", *model, "--split", "test")
    assert list(in_empty_folder.iterdir()) == []


def test_weights_of_lpips_that_are_not_there_are_told(
    fails, model_folders: Path, tiny_dataset, in_empty_folder
) -> None:
    options = ["--split", "train", "--measure", "reconstruction", "--lpips", "vgg.pth", "lpips.pth"]
    assert "vgg.pth: no such file" in fails("evaluate", model_folders, tiny_dataset.folder, *options)


def test_the_result_is_plain_json(evaluate) -> None:
    assert evaluate("--split", "train", "--measure", "reconstruction", "--out", "o") == 0
    content = json.loads(Path("o/result.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["measures"]["reconstruction"]["rows"][0]["name"] == "psnr"
