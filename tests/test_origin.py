"""What is told of where something was made."""

import subprocess
from pathlib import Path

from vqt2i.origin import git_commit


def test_the_commit_is_that_of_the_code_and_marks_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "a")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a.py").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"
    (tmp_path / "installed").mkdir()
    assert git_commit(tmp_path / "installed") is None
