"""C++ of this package, compiled for the CPU at hand when it is first needed, and kept in the user's cache.

A library has a name that says what it was made of, so that another source, compiler or CPU makes another.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from vqt2i.errors import ConfigError
from vqt2i.files import cache_folder
from vqt2i.runtime import find_cpp_compiler

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")
COMPILE_TIMEOUT_S = 300


@cache
def load_library(source: str) -> ctypes.CDLL:
    """The library of a C++ file beside this one. Compiling it takes some seconds, the first time.

    Raises:
        ConfigError: there is no compiler, or it fails.
    """
    path, compiler = Path(__file__).with_name(source), find_cpp_compiler()
    if compiler is None:
        raise ConfigError("no C++ compiler found (CXX, g++ or clang++); install one, or take the engine plain")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    made_of = (path.read_text(encoding="utf-8"), FLAGS, compiler, version, platform.machine(), _cpu_features())
    name = f"{path.stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    library = cache_folder() / "native" / name
    if not library.is_file():
        _compile(compiler, path, library)
    return ctypes.CDLL(str(library))


def _compile(compiler: str, source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_name(f".{library.stem}-{os.getpid()}.so")
    command = [compiler, *FLAGS, str(source), "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise ConfigError(f"{compiler} cannot compile {source.name}: {first}; take the engine plain")
        os.replace(partial, library)
    finally:
        partial.unlink(missing_ok=True)


def _cpu_features() -> str:
    """What -march=native follows from: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
