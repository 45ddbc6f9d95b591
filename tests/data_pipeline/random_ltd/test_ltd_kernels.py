"""The kernels for GPUs. Without one they run in Triton's interpreter, and are compiled for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import token_kernels

pytest.importorskip("triton")


def run(mode: str, tmp_path: Path, **variables: str) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **variables}
    subprocess.run(
        [sys.executable, "-m", "support.token_kernels", mode],
        cwd=Path(token_kernels.__file__).parents[1],
        env=env,
        check=True,
        timeout=100,
    )


def test_kernels_equal_plain_references_in_the_interpreter(tmp_path):
    run("interpret", tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu(tmp_path):
    run("compile", tmp_path, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_equal_plain_references_on_the_gpu():
    token_kernels.check_all("cuda")
