"""The map of the house: imports point down, and a part does not import one beside it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vqt2i
from vqt2i.cli import VERBS

PACKAGE = Path(vqt2i.__file__).parent
# from the ground up, as in the design; __init__.py names what users import and imports it when asked for
ROWS = (
    {"errors"},
    {"files"},
    {"config", "runtime", "weights"},
    {"nn", "checkpoint", "processes", "origin"},
    {"text", "data"},
    {"vq", "gpt", "clip"},
    {"generation", "peers"},
    {"training", "evaluation"},
    {"serving"},
    {"cli"},
)
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[str]:
    """Dotted names of all imports, those inside functions and `if TYPE_CHECKING` too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        assert {name.rpartition(".")[0] for name in imported_modules(path)} <= {"typing", "vqt2i", "vqt2i.generation"}
        return
    assert own in ROW, f"{own} has no row"
    for name in imported_modules(path):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "vqt2i" or other in (own, "__version__"):
            continue
        assert ROW[other] < ROW[own], f"{path}: {own} imports {other}"


def test_tools_are_thin_and_there_is_one_for_each_verb() -> None:
    tools = sorted((PACKAGE.parent / "tools").glob("*.py"))
    assert {tool.stem for tool in tools} == set(VERBS)
    for tool in tools:
        assert len(tool.read_text(encoding="utf-8").splitlines()) < 60


def test_help_of_every_command_needs_no_heavy_library() -> None:
    script = f"""
import contextlib, io, json, sys
from vqt2i.cli import main
codes = []
for argv in [["--help"], *([verb, "--help"] for verb in {VERBS!r})]:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            codes.append(main(argv))
        except SystemExit as stop:
            codes.append(stop.code)
heavy = [name for name in ("torch", "lightning", "numpy", "sentencepiece", "PIL") if name in sys.modules]
print(json.dumps([codes, heavy]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    codes, heavy = json.loads(out)
    assert codes == [0] * (len(VERBS) + 1)
    assert heavy == []


def test_the_package_gives_its_public_names_and_loads_torch_for_them_only() -> None:
    script = """
import json, sys, vqt2i
before = "torch" in sys.modules
from vqt2i import Sample, SamplingConfig, TextToImage
import vqt2i.generation as g
same = [Sample is g.Sample, SamplingConfig is g.SamplingConfig, TextToImage is vqt2i.TextToImage is g.TextToImage]
print(json.dumps([before, same, hasattr(vqt2i, "Pipeline")]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [False, [True, True, True], False]
