"""Processes for benchmarks that need several ranks on this machine."""

import json
import os
import socket
import subprocess
import sys
from typing import Any


def run_ranks(module: str, ranks: int, *arguments: str, timeout_s: float = 240.0) -> list[Any]:
    """Run ``python -m module RANK RANKS PORT ...`` once per rank; returns the JSON value each prints last.

    Raises:
        RuntimeError: A rank failed; with what it wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(ranks), *arguments],
            env={**env, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=timeout_s) for process in processes]
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode:
            raise RuntimeError(f"rank {rank} of {module} ended with {process.returncode}:\n{errors}")
    return [json.loads(text.splitlines()[-1]) for text, _ in outputs]
