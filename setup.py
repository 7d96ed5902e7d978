"""Runs CMake (see CMakeLists.txt) and puts the native module into the package.

TAYLOR_KERNELS_CUDA=auto|on|off chooses whether the CUDA kernels are built; the default, auto,
builds them where a GPU is seen and an nvcc is found that can, and goes on without them where it
fails. For a GPU of another machine say on.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("TAYLOR_KERNELS_CUDA", "auto")
        try:
            self.run_cmake(ext, cuda)
        except subprocess.CalledProcessError:
            if cuda != "auto":
                raise
            print("taylor_kernels: the build failed; once more without CUDA", file=sys.stderr)
            self.run_cmake(ext, "off")

    def run_cmake(self, ext: Extension, cuda: str) -> None:
        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # What an editable install compiled is kept: the next one compiles what has changed since,
        # and the tests read its machine code. Which tree and Python it was for is asked anew.
        kept = source / "build" if self.editable_mode else Path(self.build_temp).resolve()
        build = kept / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PYBIND11_FINDPYTHON": "ON",
            "TAYLOR_KERNELS_CUDA": cuda,
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(
    ext_modules=[Extension("taylor_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
