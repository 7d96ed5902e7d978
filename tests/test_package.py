"""The package as pip makes it: an isolated build, from sources alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, machine_code

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


#: Whichever pybind11 a compiler is shown, it is of one version (constraints.txt).
PYBIND11 = r"\S+(?=/pybind11/include)"
#: Before every compiler. What the package's own build made of the same sources with the same words
#: is taken from there. How fast the rest is is no matter, and optimizing takes long.
QUICKLY = """#!{python} -SE
import os, re, shutil, sys
made = {made}
words = sys.argv[1:]
command = re.sub(r" -MD -MT \\S+ -MF \\S+", "", " ".join(words)).replace({sources!r}, {root!r})
command = re.sub({pybind11!r}, "", command)
if command in made:
    shutil.copy(made[command], words[words.index("-o") + 1])
else:
    os.execvp(words[0], ["-O0" if word == "-O3" else word for word in words])
"""


def made_before() -> dict[str, str]:
    """How all but the module itself was compiled in build/cmake -> the object, up to date; none
    where none was."""
    if not (machine_code.BUILD / "build.ninja").exists():
        return {}
    machine_code.configure()
    jobs = json.loads((machine_code.BUILD / "compile_commands.json").read_text())
    made = {
        " ".join(shlex.split(re.sub(PYBIND11, "", job["command"]))): machine_code.BUILD
        / job["output"]
        for job in jobs
        if Path(job["file"]).suffix == ".cpp" and Path(job["file"]).name != "module.cpp"
    }
    machine_code.bring_up_to_date(made.values())
    return {command: str(path) for command, path in made.items()}


def build_wheel(sources: Path, out: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    quickly = sources.parent / "quickly"
    places = {"sources": str(sources), "root": str(ROOT)}
    made = made_before()
    quickly.write_text(
        QUICKLY.format(python=sys.executable, made=made, pybind11=PYBIND11, **places)
    )
    quickly.chmod(0o755)
    changed = {
        "TAYLOR_KERNELS_CUDA": cuda,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        # What the build is given, under the name of newer and of older versions of pip.
        **dict.fromkeys(("PIP_BUILD_CONSTRAINT", "PIP_CONSTRAINT"), str(ROOT / "constraints.txt")),
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
