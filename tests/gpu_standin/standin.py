"""A CUDA device that is not there: builds it, runs programs on it, and tells what they did.

    python tests/gpu_standin/standin.py PYTHON ARGUMENT...      run PYTHON, which has a CUDA build of torch, with these arguments

cuda.cpp says what is there and what is looked at; it checks no numbers, no choice of kernels and no times.  Building it takes g++ and
the CUDA headers that come with torch's wheels.  Programs that run on it import this module for `counted` and `violations`.
"""
from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "GPU_STANDIN"                                 # the variable that names the built library
# what torch is asked of its build: folders of its libraries and of the wheels beside it, and the versions it was built with
ASK = """
import json, pathlib, torch
site = pathlib.Path(torch.__file__).parent.parent
numbers = [int(n) for n in (torch.version.cuda or "0.0").split(".")]
headers = sorted(str(p.parent) for p in site.glob("nvidia/**/driver_types.h"))
version = next(iter(site.glob("nvidia/**/cudnn_version*.h")), None)
print(json.dumps({"lib": str(site / "torch/lib"), "headers": headers[:1], "cudart": 1000 * numbers[0] + 10 * numbers[1],
                  "cudnn": str(version) if version else "", "torch": torch.__version__}))
"""
KERNEL = re.compile(r"cublas([SDCZI][a-z0-9]+|GemmEx|GemmStridedBatchedEx|SgemmEx|DotEx)(_v2|Batched|StridedBatched)?$"
                    r"|cudnn(BatchNormalization(Forward|Backward)|Convolution(Forward|Backward|Bias)|PoolingForward|RNN(Forward|Backward))")


class Missing(Exception):
    """What is needed to build the stand-in is not there."""


def build(python: str, folder: Path) -> Path:
    """The stand-in for this interpreter's torch, built in `folder` unless it is there.  Raises Missing with a reason."""
    asked = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise Missing(f"{python} has no torch")
    build_of = json.loads(asked.stdout)
    if not build_of["cudart"] or not build_of["headers"]:
        raise Missing(f"torch {build_of['torch']} of {python} is no CUDA build, or the wheels with CUDA's headers are missing")
    source = (HERE / "cuda.cpp").read_text()
    digest = hashlib.sha256((source + Path(__file__).read_text() + asked.stdout).encode()).hexdigest()[:16]
    library = folder / f"standin-{digest}.so"
    if library.exists():
        return library
    (folder / "crt").mkdir(parents=True, exist_ok=True)
    (folder / "crt/host_defines.h").write_text("")
    (folder / "stubs.cpp").write_text(stubs(Path(build_of["lib"]), source))
    versions = [f"-DCUDART={build_of['cudart']}", f"-DCUDNN={cudnn_version(build_of['cudnn'])}"]
    part = library.with_suffix(".part")
    try:
        subprocess.run(["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
                        "-Wl,-soname,libcuda.so.1", f"-I{folder}", f"-I{build_of['headers'][0]}", *versions, HERE / "cuda.cpp",
                        folder / "stubs.cpp", "-o", part], check=True)
    except FileNotFoundError:
        raise Missing("there is no C++ compiler g++") from None
    part.replace(library)
    return library


def cudnn_version(header: str) -> int:
    """As cudnnGetVersion gives it."""
    found = dict(re.findall(r"#define CUDNN_(MAJOR|MINOR|PATCHLEVEL) (\d+)", Path(header).read_text())) if header else {}
    return 10000 * int(found.get("MAJOR", 9)) + 100 * int(found.get("MINOR", 0)) + int(found.get("PATCHLEVEL", 0))


def stubs(libraries: Path, source: str) -> str:
    """All that torch's libraries ask of CUDA and cuda.cpp does not define: calls that are counted, handles, and nothing at all."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries.glob("lib*.so")], stdout=subprocess.PIPE, text=True, check=True)
    asked = set(re.findall(r" U ((?:__)?cu(?:da|blas|dnn|[A-Z])\w*)", listed.stdout))
    lines = ["#include <stdlib.h>", 'extern "C" int standin_call(const char*, void*);',
             '#define API extern "C" __attribute__((visibility("default")))']
    for name in sorted(name for name in asked if not re.search(rf"\b{name}\(", source)):
        if KERNEL.match(name):
            lines.append(f'API int {name}(void* handle, ...) {{ return standin_call("{name}", handle); }}')
        elif re.match(r"(cudnn|cublasLt)\w*Create", name):
            lines.append(f"API int {name}(void** made, ...) {{ *made = calloc(1, 4096); return 0; }}")
        elif not name.startswith("cuFile"):
            lines.append(f"API int {name}() {{ return 0; }}")
    return "\n".join(lines) + "\n"


def environment(library: Path) -> dict[str, str]:
    """The environment of a program that is to run on the stand-in."""
    folders = [str(HERE.parents[1] / folder) for folder in ("python", "", "benchmarks", "tests/torchcaffe", "tests/hintkd")]
    path = os.pathsep.join([str(HERE), *folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# -- inside a program ---------------------------------------------------------------------------------------------------------
def _device() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[LIBRARY])


def _text(function: Callable[[ctypes.Array[ctypes.c_char], int], int]) -> list[str]:
    room = ctypes.create_string_buffer(1 << 22)
    function(room, len(room))
    return room.value.decode().splitlines()


def violations() -> list[str]:
    """What a capture forbids and the program has done so far."""
    return _text(_device().standin_violations)


def nodes() -> int:
    """How many kernels and copies the last recording holds."""
    return int(_device().standin_nodes())


def counted(work: Callable[[], object]) -> Counter[str]:
    """The kernels, copies and waits of a call, by name; a replayed recording is one, "graph"."""
    device = _device()
    device.standin_count(1)
    try:
        work()
    finally:
        device.standin_count(0)
    return Counter({name: int(number) for number, name in (line.split(" ", 1) for line in _text(device.standin_report))})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        made = build(sys.argv[1], Path(tempfile.gettempdir()) / f"gpu_standin-{os.getuid()}")
    except Missing as missing:
        sys.exit(f"standin.py: {missing}")
    os.execvpe(sys.argv[1], sys.argv[1:], environment(made))
