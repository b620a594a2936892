import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqt2i.cli import main
from vqt2i.generation import DrawConfig, TextToImage


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_captions_are_printed_with_their_log_p_and_written(
    model_folders: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--draw", "--temperature", "0.5", "--top-p", "0.9", "--n", "2", "--seed", "3"]
    command = ["caption", str(picture), str(picture), "--model", str(model_folders), *options]
    assert main([*command, "--out", str(tmp_path / "c.jsonl")]) == 0
    told = capsys.readouterr().out.splitlines()
    expected = TextToImage.load(model_folders, "cpu").caption(
        [np.asarray(Image.open(picture))] * 2, n=2, how=DrawConfig(temperature=0.5, top_p=0.9), seed=3
    )
    assert told[0] == told[3] == str(picture)
    assert told[1] == f"  {expected[0][0].log_p:7.3f}  {expected[0][0].text}"
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["caption"] for line in lines] == [c.text for group in expected for c in group]


def test_bad_input_is_told(model_folders: Path, picture: Path, tmp_path: Path, fails) -> None:
    model = ["--model", model_folders]
    assert "none.png: missing file" in fails("caption", tmp_path / "none.png", *model)
    (tmp_path / "x.png").write_bytes(b"x")
    assert "x.png: not an image" in fails("caption", tmp_path / "x.png", *model)
    assert "expected a pipeline folder or a GPT run" in fails("caption", picture, "--model", model_folders / "vq")
    assert "temperature: of drawing, which needs --draw" in fails("caption", picture, *model, "--temperature", 1)
    beams = ["--draw", "--beams", 2]
    assert "n_beams: of a beam search, which --draw replaces" in fails("caption", picture, *model, *beams)
    assert "top_p" in fails("caption", picture, *model, "--draw", "--top-p", 2)
