"""The build of the one compiled module. Everything else about the package is in pyproject.toml."""

import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("src/kvindex")

# A build with its own level of optimisation in CXXFLAGS (sanitizers, a debugger) keeps it: these flags come last on the
# compiler's command line and would override it. Without -g0, Python's own flags request debug information, which is a
# third of the compile time (21.9 s of CPU against 14.7 s) and nine tenths of the module.
optimise = [] if "-O" in os.environ.get("CXXFLAGS", "") else ["-O3", "-g0"]

HEADERS = sorted(str(path) for path in PACKAGE.rglob("*.hpp"))


class Build(build_ext):
    """Compiles the sources in parallel. A build in place keeps the objects of unchanged sources."""

    def run(self):
        if self.editable_mode:
            flags = [os.environ.get(name) for name in ("CC", "CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS")]
            self.build_temp = f"build/{sys.implementation.cache_tag}-{zlib.crc32(repr(flags).encode()):08x}"
        super().run()

    def build_extensions(self):
        compile_all = self.compiler.compile

        def compile_changed(sources, output_dir=None, **options):
            objects = self.compiler.object_filenames(sources, output_dir=output_dir)
            changed = [s for s, o in zip(sources, objects, strict=True) if self.force or outdated(o, [s, *HEADERS])]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda source: compile_all([source], output_dir=output_dir, **options), changed))
            return objects

        self.compiler.compile = compile_changed
        super().build_extensions()


def outdated(made, sources):
    return not os.path.exists(made) or any(os.path.getmtime(made) < os.path.getmtime(source) for source in sources)


# No cythonize() call: it replaces the .pyx by the generated C++ in `sources`, and the sdist then lacks the .pyx.
core = Extension(
    "kvindex._core",
    # Code that is seldom called is compiled apart, so a change of it does not compile all the inlined code again.
    sources=["src/kvindex/_core.pyx", *sorted(str(path) for path in (PACKAGE / "_native").rglob("*.cpp"))],
    depends=[*HEADERS, *sorted(str(path) for kind in ("*.pxd", "*.pxi") for path in PACKAGE.rglob(kind))],
    include_dirs=["src/kvindex", "src/kvindex/_native"],
    language="c++",
    extra_compile_args=["-std=c++17", *optimise, "-fvisibility=hidden"],
)

setup(ext_modules=[core], cmdclass={"build_ext": Build})
