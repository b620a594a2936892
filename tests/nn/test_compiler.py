from pathlib import Path

import pytest

from vqt2i.errors import ConfigError
from vqt2i.nn import compiler


def test_a_library_is_compiled_once_and_another_source_makes_another(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int answer() { return 41; }')
    load = compiler.load_library.__wrapped__
    assert load("tiny.cpp").answer() == 41
    (made,) = (tmp_path / "cache" / "vqt2i" / "native").iterdir()
    before = made.stat().st_mtime_ns
    assert load("tiny.cpp").answer() == 41 and made.stat().st_mtime_ns == before
    source.write_text('extern "C" int answer() { return 42; }')
    assert load("tiny.cpp").answer() == 42 and len(list((tmp_path / "cache" / "vqt2i" / "native").iterdir())) == 2


def test_a_source_that_does_not_compile_is_told_and_leaves_nothing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))
    (tmp_path / "bad.cpp").write_text("int x = ;")
    with pytest.raises(ConfigError, match=r"cannot compile bad\.cpp: .*error.*; take the engine plain"):
        compiler.load_library.__wrapped__("bad.cpp")
    assert list((tmp_path / "cache" / "vqt2i" / "native").iterdir()) == []
