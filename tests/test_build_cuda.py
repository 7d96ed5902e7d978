"""Which nvcc builds the CUDA kernels, for which GPUs, and what happens where none can.

A script plays the nvcc of another version: nothing here needs a real one but the last test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.samples import some

CMAKE = shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, version: str, compile_with: str = "exit 0") -> Path:
    """An nvcc that says it is of that version; `compile_with` is what else it does."""
    says = f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V1"'
    return script(folder / "bin" / "nvcc", f"{says}; exit 0; fi\n{compile_with}")


def fake_gpu(folder: Path, said: str = "GPU 0: NVIDIA A100 (UUID: GPU-1)", rc: int = 0) -> Path:
    """The driver's program that lists GPUs."""
    return script(folder / "bin" / "nvidia-smi", f'[ "$1" = -L ] && echo "{said}"; exit {rc}')


def run_cmake(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CMAKE_CUDA"))}
    return subprocess.run(
        [str(CMAKE), *map(str, arguments)], env=kept | environment, capture_output=True, text=True
    )


def found(folder: Path, nvcc: Path | None, **environment: str) -> str:
    """What find_usable_cuda says: the problem, or the architectures."""
    ask = folder / "ask.cmake"
    ask.write_text(
        f'include("{ROOT}/cmake/cuda_compiler.cmake")\n'
        f'set(CMAKE_CURRENT_BINARY_DIR "{folder}")\n'
        "find_usable_cuda(problem)\n"
        'message("${problem}|${CMAKE_CUDA_ARCHITECTURES}|${CUDA_ARCHITECTURES}|${CMAKE_CUDA_COMPILER}")'
    )
    path = f"{nvcc.parent}:/usr/bin:/bin" if nvcc else "/usr/bin:/bin"
    run = run_cmake("-P", ask, PATH=path, **environment)
    assert run.returncode == 0, run.stderr
    return run.stderr.strip()


def configure(folder: Path, nvcc: Path, choice: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    return run_cmake(
        *("-S", ROOT, "-B", folder / "build", f"-DTAYLOR_KERNELS_CUDA={choice}"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DPYBIND11_FINDPYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        PATH=f"{nvcc.parent}:{os.environ['PATH']}",
    )


@pytest.mark.parametrize(
    ("version", "architectures", "words"),
    [
        ("12.1", "80-real;90", "sm_80 sm_90 compute_90"),
        ("12.6", "80-real;90", "sm_80 sm_90 compute_90"),
        ("12.8", "80-real;90-real;100", "sm_80 sm_90 sm_100 compute_100"),
        ("13.0", "80-real;90-real;100", "sm_80 sm_90 sm_100 compute_100"),
    ],
)
def test_an_nvcc_compiles_for_what_it_knows(
    version: str, architectures: str, words: str, tmp_path: Path
) -> None:
    nvcc = fake_nvcc(tmp_path, version)
    assert found(tmp_path, nvcc) == f"|{architectures}|{words}|{nvcc}"


@pytest.mark.parametrize("version", ["11.8", "12.0"])
def test_an_nvcc_that_is_too_old_is_not_used(version: str, tmp_path: Path) -> None:
    said = found(tmp_path, fake_nvcc(tmp_path, version))
    assert f"nvcc {version} " in said
    assert "is too old; 12.1 is the first" in said


def test_the_list_of_the_user_comes_first(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "12.6", f'echo "$@" > {tmp_path}/flags')
    said = found(tmp_path, nvcc, CUDAARCHS="86-real;120-virtual")
    assert said == f"|86-real;120-virtual|sm_86 compute_120|{nvcc}"
    flags = (tmp_path / "flags").read_text().split()
    assert [flag for flag in flags if "arch" in flag] == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_an_nvcc_that_fails_is_quoted(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "12.6", "echo 'error: unsupported GNU version!' >&2; exit 1")
    said = found(tmp_path, nvcc)
    assert f"nvcc 12.6 ({nvcc}) does not compile for sm_80 sm_90 compute_90" in said
    assert "error: unsupported GNU version!" in said


@pytest.mark.parametrize("text", ["exit 1", "echo clang version 17", "echo release"])
def test_what_is_no_nvcc_is_not_used(text: str, tmp_path: Path) -> None:
    said = found(tmp_path, script(tmp_path / "bin" / "nvcc", text))
    assert "does not tell its version" in said


def test_no_nvcc(tmp_path: Path) -> None:
    assert "no nvcc was found; put it on PATH" in found(tmp_path, None)


def test_cudacxx_and_cuda_path_are_looked_at(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "12.6")
    for environment in ({"CUDACXX": str(nvcc)}, {"CUDA_PATH": str(tmp_path)}):
        assert found(tmp_path, None, **environment).endswith(str(nvcc))


def test_an_nvcc_that_was_moved_is_found_again(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(ask NONE)\n"
        f'include("{ROOT}/cmake/cuda_compiler.cmake")\n'
        'find_nvcc(nvcc)\nmessage(STATUS "found ${nvcc}")\n'
    )
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        nvcc = fake_nvcc(tmp_path / folder, "12.6")
        path = f"{nvcc.parent}:{os.environ['PATH']}"
        run = run_cmake("-S", project, "-B", tmp_path / "build", PATH=path)
        assert f"found {nvcc}" in run.stdout
        nvcc.unlink()


def test_auto_goes_on_without_an_nvcc_that_is_too_old(tmp_path: Path) -> None:
    fake_gpu(tmp_path)
    run = configure(tmp_path, fake_nvcc(tmp_path, "11.8"), "auto")
    assert run.returncode == 0, run.stderr
    assert "without CUDA: nvcc 11.8 " in run.stdout


HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")
@pytest.mark.parametrize(
    ("said", "rc"), some([(None, 0), ("No devices were found", 0), ("GPU 0: lost", 9)], 1)
)
def test_auto_builds_nothing_for_a_gpu_that_is_not_there(
    said: str | None, rc: int, tmp_path: Path
) -> None:
    if said is not None:
        fake_gpu(tmp_path, said, rc)
    run = configure(tmp_path, fake_nvcc(tmp_path, "13.0", f"touch {tmp_path}/compiled"), "auto")
    assert run.returncode == 0, run.stderr
    assert "without CUDA: no NVIDIA GPU is seen; TAYLOR_KERNELS_CUDA=on builds for" in run.stdout
    assert not (tmp_path / "compiled").exists()


def test_auto_builds_for_a_gpu_that_the_driver_lists(tmp_path: Path) -> None:
    fake_gpu(tmp_path)
    run = configure(tmp_path, fake_nvcc(tmp_path, "13.0", "echo no compiler >&2; exit 1"), "auto")
    assert run.returncode == 0, run.stderr
    assert "without CUDA: nvcc 13.0 " in run.stdout
    assert "no compiler" in run.stdout


def test_on_fails_with_an_nvcc_that_is_too_old(tmp_path: Path) -> None:
    run = configure(tmp_path, fake_nvcc(tmp_path, "11.8"), "on")
    assert run.returncode != 0
    assert "TAYLOR_KERNELS_CUDA=on, but nvcc 11.8 " in " ".join(run.stderr.split())


@pytest.mark.parametrize(("choice", "builds"), [("auto", ["auto", "off"]), ("on", ["on"])])
def test_a_build_that_fails_with_cuda(choice: str, builds: list[str], tmp_path: Path) -> None:
    """setup.py tries once more without, unless CUDA was asked for."""
    pytest.importorskip("pybind11")
    log = tmp_path / "log"
    cmake = script(
        tmp_path / "bin" / "cmake",
        f'echo "$@" >> {log}\n'
        f'[ "$1" = --build ] && tail -n 2 {log} | grep -q "CUDA=\\(auto\\|on\\)" && exit 1; exit 0',
    )
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path, "-t", tmp_path],
        env=os.environ
        | {"TAYLOR_KERNELS_CUDA": choice, "PATH": f"{cmake.parent}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (run.returncode == 0) == (choice == "auto"), run.stderr
    assert ("once more without CUDA" in run.stderr) == (choice == "auto")
    lines = log.read_text().splitlines()
    assert [line.rpartition("CUDA=")[2] for line in lines if "CUDA=" in line] == builds
    assert sum(line.startswith("--build") for line in lines) == len(builds)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
def test_an_nvcc_before_sm_100_builds_for_the_others(tmp_path: Path) -> None:
    """The real one, behind a script that refuses what 12.6 does not know."""
    nvcc = fake_nvcc(
        tmp_path,
        "12.6",
        'case "$*" in *arch=compute_100*) echo "Unsupported gpu architecture" >&2; exit 1;; esac\n'
        f'exec {shutil.which("nvcc")} "$@"',
    )
    run = configure(tmp_path, nvcc, "on")
    assert run.returncode == 0, run.stderr
    assert "for sm_80 sm_90 compute_90" in run.stdout
