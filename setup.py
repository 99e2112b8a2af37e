"""The one compiled module. Everything else about the package stands in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup

PACKAGE = Path("src/kvindex")

# A build that asks for its own level of optimisation (sanitizers, a debugger) keeps it: what is given here comes last
# on the compiler's command line and would win. Without -g0 Python's own flags ask for debug information, which is a
# third of the compile time (21.9 s of CPU against 14.7 s) and nine tenths of the module.
optimise = [] if "-O" in os.environ.get("CXXFLAGS", "") else ["-O3", "-g0"]

# No cythonize() call: it replaces the .pyx by the generated C++ in `sources`, and the sdist then lacks the .pyx.
core = Extension(
    "kvindex._core",
    sources=["src/kvindex/_core.pyx"],
    depends=sorted(str(p) for pattern in ("*.pxd", "*.pxi", "*.hpp") for p in PACKAGE.rglob(pattern)),
    include_dirs=["src/kvindex", "src/kvindex/_native"],
    language="c++",
    extra_compile_args=["-std=c++17", *optimise, "-fvisibility=hidden"],
)

setup(ext_modules=[core])
