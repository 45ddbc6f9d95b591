"""Machines that are network namespaces, joined by a switch that is a bridge; every one sends at a given rate.

Each machine's interface ``veth0`` is shaped on its way out by ``tc tbf`` (a token bucket), so a machine sends at the
rate and receives from each other at most at theirs. The bucket is small (a millisecond, so that nothing comes in a
burst that a measurement would take for bandwidth), the queue long enough that nothing is dropped. Needs root and
iproute2.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

_SWITCH: Final = "penstock-switch"
_MBIT: Final = 1_000_000
_PORT: Final = "29579"
_ALLOCATOR: Final = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""As ``penstock train`` sets it: memory that every step frees and takes again stays with the process."""


def require_namespaces() -> None:
    """Leave with a sentence where namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        sys.exit("network namespaces need root and iproute2 (ip, tc)")


@contextmanager
def shaped_machines(machines: int, rate_mbit: int) -> Iterator[list[str]]:
    """Namespaces that exist within the ``with`` block; gives their names.

    Args:
        machines: How many.
        rate_mbit: What each can send, in Mbit/s.
    """
    names = [f"penstock-{index}" for index in range(machines)]
    _remove([*names, _SWITCH])
    try:
        _ip("netns", "add", _SWITCH)
        _ip("-n", _SWITCH, "link", "add", "switch0", "type", "bridge")
        _ip("-n", _SWITCH, "link", "set", "switch0", "up")
        for index, name in enumerate(names):
            _ip("netns", "add", name)
            port = f"port{index}"
            _ip("link", "add", "veth0", "netns", name, "type", "veth", "peer", "name", port, "netns", _SWITCH)
            _ip("-n", _SWITCH, "link", "set", port, "master", "switch0", "up")
            _ip("-n", name, "addr", "add", f"{address(index)}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            burst = max(rate_mbit * _MBIT // 8 // 1000, 16_384)
            shape = ["rate", f"{rate_mbit}mbit", "burst", str(burst), "limit", str(16 * 2**20)]
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "veth0", "root", "tbf", *shape)
        yield names
    finally:
        _remove([*names, _SWITCH])


def address(machine: int) -> str:
    """The address of a machine's interface."""
    return f"10.78.0.{machine + 1}"


def run_machines(names: Sequence[str], module: str, *arguments: str, timeout_s: float = 280.0) -> list[Any]:
    """Run ``python -m module ARGUMENTS`` as one rank on each machine; returns the JSON value each prints last.

    Raises:
        RuntimeError: A rank failed or took too long; with the end of what it wrote.
    """
    processes = []
    for rank, name in enumerate(names):
        env = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(names)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address(0),
            "MASTER_PORT": _PORT,
            "GLOO_SOCKET_IFNAME": "veth0",
            "OMP_NUM_THREADS": "1",
            **_ALLOCATOR,
        }
        command = ["ip", "netns", "exec", name, sys.executable, "-m", module, *arguments]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end after {timeout_s:g} s") from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode:
            raise RuntimeError(f"rank {rank} ended with {process.returncode}: {errors[-2000:]}")
    return [json.loads(text.splitlines()[-1]) for text, _ in outputs]


def _remove(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
