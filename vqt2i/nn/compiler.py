"""C++ of this package, compiled for the CPU at hand when it is first needed, and kept.

A library lies in VQT2I_CACHE (default: ~/.cache/vqt2i) under a name that says what it was made of, so that another
source, compiler or CPU makes another.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from vqt2i.errors import ConfigError

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")
COMPILE_TIMEOUT_S = 300


def cache_folder() -> Path:
    """Where compiled code is kept."""
    return Path(os.environ.get("VQT2I_CACHE") or Path.home() / ".cache" / "vqt2i")


@cache
def find_compiler() -> str | None:
    """The C++ compiler: that of the variable CXX, else the first of g++, clang++ and c++ that is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


@cache
def load_library(source: str) -> ctypes.CDLL:
    """The library of a C++ file beside this one. Compiling it takes some seconds, the first time.

    Raises:
        ConfigError: there is no compiler, or it fails.
    """
    path = Path(__file__).with_name(source)
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError("engine native: no C++ compiler found (looked for g++, clang++, c++); install one, set CXX, "
                          "or take engine plain")  # fmt: skip
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    made_of = (path.read_text(encoding="utf-8"), FLAGS, compiler, version, platform.machine(), _cpu_features())
    name = f"{path.stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    library = cache_folder() / name
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
            raise ConfigError(f"engine native: {compiler} cannot compile {source.name}: {first}; take engine plain")
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
