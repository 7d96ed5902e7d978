"""The package as pip makes it: an isolated build, from sources alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT

SOURCES = (
    "cmake",
    "csrc",
    "taylor_kernels",
    "CMakeLists.txt",
    "MANIFEST.in",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a build needs, without anything built before."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


#: Before every compiler: how fast the kernels are is no matter here, and optimizing takes minutes.
QUICKLY = """#!/bin/sh
for word; do
  shift
  [ "$word" = -O3 ] && word=-O0
  set -- "$@" "$word"
done
exec "$@"
"""


def build_wheel(sources: Path, out: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    quickly = sources.parent / "quickly"
    quickly.write_text(QUICKLY)
    quickly.chmod(0o755)
    changed = {
        "TAYLOR_KERNELS_CUDA": cuda,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "CMAKE_CXX_COMPILER_LAUNCHER": str(quickly),
    }
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, sources],
        env=os.environ | changed,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_an_isolated_build_without_cuda(sources: Path, tmp_path: Path):
    run = build_wheel(sources, tmp_path / "out", "off")
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert any(name.startswith("taylor_kernels/_native.") for name in names)
    assert "taylor_kernels/py.typed" in names
    assert not any(name.startswith(("csrc/", "tests/", "bench/")) for name in names)
    script = (
        "import torch, taylor_kernels as tk; assert 'site' in tk.__file__\n"
        "assert tk.available_backends()['cpu'], tk.available_backends()\n"
        "print(tk.available_backends()['cuda'])\n"
        "print(tk.filter_moments(*torch.ones(2, 3, 4)).tolist()[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "the package was built without CUDA; rebuild it where nvcc is" in run.stdout
    assert "[4.0, 4.0, 4.0, 4.0, 4.0]" in run.stdout


def test_a_wrong_choice_of_cuda_is_an_error(sources: Path, tmp_path: Path):
    run = subprocess.run(
        ["cmake", "-S", sources, "-B", tmp_path / "build", "-DTAYLOR_KERNELS_CUDA=maybe"],
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "TAYLOR_KERNELS_CUDA is 'maybe'; choose auto, on or off" in run.stderr


def test_cuda_wanted_but_absent_is_an_error(sources: Path, tmp_path: Path):
    run = subprocess.run(
        [
            *("cmake", "-S", sources, "-B", tmp_path / "build", "-DTAYLOR_KERNELS_CUDA=on"),
            "-DCMAKE_CUDA_COMPILER=",
            f"-Dpybind11_DIR={__import__('pybind11').get_cmake_dir()}",
        ],
        env=os.environ | {"CUDACXX": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "TAYLOR_KERNELS_CUDA=on, but no nvcc was found" in run.stderr
