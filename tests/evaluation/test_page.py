import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vqt2i.data.report import section_text
from vqt2i.evaluation.page import RECONSTRUCTIONS, label_of, sections_of, shown, told_rows, write_page
from vqt2i.evaluation.plot import Line, Point, best_front, front_chart, line_chart
from vqt2i.evaluation.result import Measured, Result, Row
from vqt2i.origin import Origin

ORIGIN = Origin(time="now", command="python <x>", git_commit=None, versions={"torch": "2"}, machine={})


def measured(*rows: Row) -> Measured:
    return Measured(protocol={"prompts": {"n": 2}}, rows=rows, seconds=2.0, origin=ORIGIN)


def alignment(name: str, group: str, by: str, of: int, value: float) -> Row:
    return Row(name, value, value - 0.1, value + 0.1, 2, {"group": group, "chosen by": by, "of": of})


ROWS = (
    alignment("right", "all prompts", "random", 1, 0.4),
    *(alignment("right", "all prompts", "clip", k, 0.4 + k / 10) for k in (1, 2, 4)),
    alignment("right", "objects: <1>", "random", 1, 0.5),
    alignment("right", "objects: <1>", "clip", 4, 0.6),
    Row("seconds", 0.1, None, None, 4, {"step": "drawing"}),
    Row("seconds", 0.02, None, None, 4, {"step": "clip"}),
)
SWEEP = tuple(
    Row(name, value, value, value, 2, {"guidance": guidance})
    for guidance, *values in ((1.0, 0.2, 0.5), (2.0, 0.1, 0.9))
    for name, value in zip(("fid", "right"), values, strict=True)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of two prompts, the second candidate ranked first."""
    samples = tmp_path / "samples"
    samples.mkdir()
    line = '{"prompt": "a <b>", "candidates": [{"file": "1.png", "index": 1}, {"file": "0.png", "index": 0}]}\n'
    (samples / "scores.jsonl").write_text(line * 2)
    for i in range(2):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(samples / f"{i}.png")
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / RECONSTRUCTIONS)
    return tmp_path


def test_the_page_holds_every_measure_and_needs_nothing_beside_it(folder: Path) -> None:
    measures = {
        "alignment": measured(*ROWS),
        "fidelity": measured(Row("fid", 12.0, 11.0, 13.0, 40, {"chosen by": "random", "of": 1})),
        "reconstruction": measured(Row("psnr", 30.0, 29.0, 31.0, 50, {}), Row("code_usage", 0.5, None, None, 50, {})),
        "sweep": measured(*SWEEP),
        "captions": measured(Row("sentence", 1.0, 1.0, 1.0, 4, {"scenes": "single_seen"})),
    }
    page = write_page(Result(model="<m>", fingerprints={"gpt": "0123456789"}, measures=measures), folder)
    assert "Measured: &lt;m&gt;" in page and "gpt 01234567" in page and "a &lt;b&gt;" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 * 2 + 1 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "href=" not in page and "<script" not in page and "<b>" not in page
    assert "objects: &lt;1&gt;" in page and "12.0 (11.0 to 13.0)" in page and "python &lt;x&gt;" in page
    assert page.count("<svg") == 2  # a curve of reranking, a front


def test_tables_hold_the_unreranked_and_the_best_of_most() -> None:
    first, grouped, costs = sections_of("alignment", ROWS)
    assert first.columns == ("", "n", "unreranked", "by CLIP")
    assert first.rows == [("all right, %", 2, "40.0 (30.0 to 50.0)", "80.0 (70.0 to 90.0)")]
    assert grouped.rows == [("objects: <1>", 2, "50.0 (40.0 to 60.0)", "60.0 (50.0 to 70.0)")]
    assert costs.rows == [("unreranked", "100.0", "0.10"), ("by CLIP", "120.0", "0.48")]
    assert "80.0" in section_text(first) and len(told_rows(ROWS)) == 4
    (sweep,) = sections_of("sweep", SWEEP)
    assert sweep.columns[2:] == ("1", "2") and sweep.rows[1] == ("all right, %", 2, "50.0", "90.0")


def test_distances_by_a_clip_are_never_called_fid() -> None:
    for name in ("clip_frechet_distance", "clip_kernel_distance", "clip_precision", "clip_recall"):
        assert "CLIP image tower" in label_of(name) and "Inception" not in label_of(name)
    assert label_of("fid") == "FID (Inception)"
    assert shown(Row("fid", 1234.5, 1.25, 0.5, 1, {})) == "1,234.5 (1.250 to 0.500)"
    assert shown(Row("kid", 0.0002, -0.0011, 0.01, 1, {})) == "0.0002 (-0.0011 to 0.010)"


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [Point("a", 1, 1), Point("b", 2, 3), Point("c", 2, 2), Point("d", 3, 3), Point("e", 3, 4)]
    assert [point.name for point in best_front(points)] == ["a", "b", "e"]


def texts_of(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-4, 2e-4], [-3.0, 1e6]])
def test_plots_are_svg_whatever_the_values(values: Sequence[float]) -> None:
    line = Line("by <c>", [1, 16], values, [None, None], [None, None])
    texts = texts_of(line_chart("t & u", [line, line], "candidates"))
    assert texts.count("by <c>") == 2 and {"t & u", "candidates", "1", "16"} <= set(texts)
    points = [Point(str(i), i, value) for i, value in enumerate(values)]
    assert {"0", "1", "x"} <= set(texts_of(front_chart("t", points, best_front(points), "x")))
