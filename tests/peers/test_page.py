"""docs/checkpoints.md: its commands are understood, and the presets that it names are there."""

import re
import shlex
from pathlib import Path

import pytest

from vqt2i.cli import parser_of
from vqt2i.peers import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
    if line.startswith("python tools/")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    _, script, *arguments = shlex.split(command)
    args = parser_of(Path(script).stem).parse_args(arguments)
    assert getattr(args, "family", None) in (None, *FAMILIES)


def test_links_lead_somewhere_and_every_preset_is_that_of_a_family_on_the_page() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
    presets = sorted((ROOT / "configs" / "sampling").glob("*.yaml"))
    assert presets and all(path.stem in FAMILIES and path.name in PAGE for path in presets)
