import re
import shlex
from pathlib import Path

import pytest

from vqt2i.cli import parser_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("python tools/")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command: str):
    _, script, *arguments = shlex.split(command)
    assert (ROOT / script).is_file()
    args = parser_of(Path(script).stem).parse_args(arguments)
    for path in [getattr(args, "config", None)]:
        assert path is None or (ROOT / path).is_file()


def test_the_python_example_of_the_readme_runs(in_empty_folder: Path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (in_empty_folder / "vqt2i").symlink_to(ROOT / "vqt2i")
    smaller = example.replace("n=4, rerank=16", "n=1, rerank=1")
    assert smaller != example
    found = {}
    exec(smaller, found)
    assert len(found["best"]) == 1 and Path("best.png").is_file()


def test_every_picture_and_file_the_readme_shows_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_nothing_tells_where_it_was_made():
    assert COMMANDS
    for path in [ROOT / "README.md", *ROOT.glob("configs/*/*.yaml"), *ROOT.glob("vqt2i/pretrained/**/card.json")]:
        assert not re.search(r"/(work|home|root|tmp)/", path.read_text(encoding="utf-8")), path
