"""Compile the C++ operators under the address and undefined-behaviour sanitisers, and run each of them once: `python tests/sanitize.py`.

Takes some minutes. The sanitisers' runtime is preloaded into a second Python process, which loads the instrumented library in place
of the usual one. Findings end that process with a report and a non-zero exit status.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O2", "-g"]


def run_operators():
    "Call every operator, forward and backward, with sizes that leave partial tiles and vectors."
    from krause_repro.native_kernels import candidate_lists
    from krause_repro.reference import GridWindow, segment_starts

    torch.manual_seed(0)
    ops = torch.ops.krause_repro
    shapes = [  # heads, key heads, queries, keys, dim, window, top_k
        (4, 2, 65, 65, 24, 20, 7), (2, 2, 150, 150, 16, 70, 0), (4, 4, 3, 90, 32, 17, 5), (3, 3, 40, 40, 9, 1000, 4),
        (4, 2, 1, 77, 32, 30, 8),
    ]
    for heads, kv_heads, queries, keys, dim, window, top_k in shapes:
        for score in range(3):
            for dropout, masked, packed in ((0.0, False, False), (0.3, True, True), (0.0, False, True)):
                query, grad = torch.randn(2, heads, queries, dim), torch.randn(2, heads, queries, dim + 8)
                key, value = torch.randn(2, kv_heads, keys, dim), torch.randn(2, kv_heads, keys, dim + 8)
                tau, mask = torch.rand(heads) + 0.5, torch.rand(2, keys) > 0.3 if masked else None
                starts = segment_starts(torch.randint(4, (2, keys)).sort(1).values).int() if packed else None
                numbers = (window, top_k, score, dropout, 5)
                out, rows = ops.band(query, key, value, tau, mask, starts, *numbers)
                ops.band_backward(grad, query, key, value, tau, mask, starts, out, rows, *numbers)
    lists, (query, key, value) = candidate_lists(GridWindow(8, 8, 2)), torch.randn(3, 2, 3, 65, 40)
    for numbers in ((6, 0, 0.0, 3), (0, 2, 0.2, 3)):
        out, rows = ops.lists(query, key, value, torch.ones(3), *lists, *numbers)
        ops.lists_backward(torch.ones_like(out), query, key, value, torch.ones(3), *lists, out, rows, *numbers)
    keys, values = torch.randn(2, 2, 32, 24).mT, torch.randn(2, 2, 24, 32)
    with torch.no_grad():
        ops.ring_step(torch.randn(2, 4, 1, 32), *torch.randn(2, 2, 2, 1, 32), keys, values, torch.tensor(1.3), 3, 20, 6)
        ops.decode_linear(torch.randn(5, 64), torch.randn(24, 64), torch.randn(24))
        ops.rotate(torch.randn(2, 3, 4, 32), torch.randn(2, 3, 2, 32), torch.randn(1, 3, 32), torch.randn(1, 3, 32))
        ops.gate(torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.randn(2, 64), torch.randn(2))
        states, weights = torch.randn(2, 2, 1, 64), list(torch.randn(4, 64, 64))
        angles, gate = torch.randn(2, 1, 1, 32), (torch.randn(2, 128), torch.randn(2))
        ring = torch.randn(2, 2, 32, 24).mT, torch.randn(2, 2, 24, 32)
        assert ops.branch_step(*states, weights, [None] * 4, *angles, *ring, torch.zeros(2), *gate, 3, 20, 6) is not None


def compile_library(folder):
    "The instrumented library; a warning is an error."
    from krause_repro.native_kernels import _OPTIONS, CSRC

    library = folder / "sanitized.so"
    options = [option for option in _OPTIONS if not option.startswith("-O")]
    headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run(
        [COMPILER, "-Wall", "-Wextra", "-Werror", *options, *SANITIZERS, "-std=c++20", "-fPIC", "-shared", *headers, str(CSRC / "ops.cpp"),
         "-o", str(library), *libraries, "-lc10", "-ltorch_cpu", "-ltorch"], check=True)
    return library


def main():
    "Compile, then run this file again with the sanitisers' runtime preloaded."
    runtimes = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
                for name in ("libasan.so", "libubsan.so")]
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(Path(folder))
        environment = {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "KRAUSE_KERNELS": "off"}
        return subprocess.run([sys.executable, __file__, str(library)], env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    torch.ops.load_library(sys.argv[1])
    run_operators()
    print("no findings")
