"""Bytes between replicas: 1-bit Adam against the same run uncompressed, by the ledger and by the kernel.

Two network namespaces joined by a veth pair; each holds all stages of one replica, so that only the exchange between
replicas (and the small talk of control) crosses the pair. Needs root and iproute2::

    python -m benchmarks.exchange_bytes
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

STEPS, WARMUP, PAIRS = 24, 4, 2
STAGES, REPLICAS = 2, 2
RESULTS = Path(__file__).parent / "results"
NAMES = ("penstock-a", "penstock-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def worker(freeze_step: int) -> None:
    """One rank: train, and report what ledger and kernel counted after warm-up."""
    import numpy as np
    import torch

    import penstock
    from penstock._core.meter import ACTIVATIONS, CONTROL, TIED
    from penstock._core.meter import REPLICAS as REPLICA_BYTES
    from penstock.models.gpt import GPTConfig, gpt_layers, gpt_loss
    from penstock.pipe.module import PipelineModule

    torch.set_num_threads(1)
    shape = GPTConfig(vocab_size=4096, num_layers=4, hidden_size=192, num_heads=6, context_length=64)
    model = PipelineModule(gpt_layers(shape), num_stages=STAGES, loss_fn=gpt_loss)
    config = {
        "deadline_s": 60,
        "pipe": {"stages": STAGES},
        "data_parallel": {"replicas": REPLICAS},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": STEPS},
        "data": {"sequence_length": 64},
        "optimizer": {"name": "onebit_adam", "lr": 1e-3, "freeze_step": freeze_step},
    }
    rows = list(np.random.default_rng(0).integers(0, 4096, size=(64, 65)))
    interface = Path("/sys/class/net/veth0/statistics")
    with penstock.initialize(model, config, training_data=rows) as engine:
        meter = engine.parts.meter
        for _ in range(WARMUP):
            engine.train_batch()
        before = Counter(meter.sent, kernel=_counters(interface))
        for _ in range(STEPS - WARMUP):
            engine.train_batch()
        spent = Counter(meter.sent, kernel=_counters(interface))
        spent.subtract(before)
        print(
            json.dumps(
                {
                    "rank": engine.rank,
                    "replica": engine.parts.groups.replica,
                    "parameters": sum(p.numel() for p in engine.stage.parameters()),
                    "kernel": spent["kernel"],
                    "ledger": spent[REPLICA_BYTES],
                    "control": spent[CONTROL],
                    "tied": spent[TIED],
                    "activations": spent[ACTIVATIONS],
                }
            ),
            flush=True,
        )


def _counters(interface: Path) -> int:
    return int((interface / "tx_bytes").read_text())


def run(freeze_step: int) -> dict[str, Any]:
    """One run over both namespaces; bytes per step and direction after warm-up."""
    processes = []
    for stage in range(STAGES):
        for replica in range(REPLICAS):
            env = {
                **os.environ,
                "RANK": str(stage * REPLICAS + replica),
                "WORLD_SIZE": str(STAGES * REPLICAS),
                "LOCAL_RANK": str(stage),
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": "29577",
                "GLOO_SOCKET_IFNAME": "veth0",
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", NAMES[replica], sys.executable, "-m", "benchmarks.exchange_bytes"]
            processes.append(subprocess.Popen([*command, str(freeze_step)], env=env, stdout=subprocess.PIPE, text=True))
    reports = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    measured = STEPS - WARMUP
    first = [report for report in reports if report["replica"] == 0]
    return {
        "parameters_per_replica": sum(report["parameters"] for report in first),
        # The interface is the namespace's, shared by its ranks, which read it at slightly different moments.
        "kernel_bytes_per_step": sum(report["kernel"] for report in first) / len(first) / measured,
        "ledger_bytes_per_step": sum(report["ledger"] for report in first) / measured,
        **{
            f"{kind}_bytes_per_step": sum(report[kind] for report in first) / measured
            for kind in ("tied", "activations", "control")
        },
    }


def make_namespaces() -> None:
    """Two namespaces joined by a veth pair."""
    remove_namespaces()
    for name in NAMES:
        _ip("netns", "add", name)
    _ip("link", "add", "veth0", "netns", NAMES[0], "type", "veth", "peer", "name", "veth0", "netns", NAMES[1])
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
        _ip("-n", name, "link", "set", "veth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")


def remove_namespaces() -> None:
    """Remove what :func:`make_namespaces` made, if it is there."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main() -> None:
    """Measure and write ``results/exchange_bytes.{json,md}``."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("network namespaces need root and iproute2")
    make_namespaces()
    try:
        pairs = [{"onebit": run(WARMUP), "uncompressed": run(STEPS)} for _ in range(PAIRS)]
    finally:
        remove_namespaces()
    keys = ("ledger_bytes_per_step", "kernel_bytes_per_step")
    ratios = {key: [pair["uncompressed"][key] / pair["onebit"][key] for pair in pairs] for key in keys}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "exchange_bytes.json").write_text(json.dumps({"pairs": pairs, "ratios": ratios}, indent=2) + "\n")
    lines = [
        "# Bytes between replicas, 1-bit Adam after warm-up against the same run uncompressed",
        "",
        f"Two stages times two replicas, {pairs[0]['onebit']['parameters_per_replica']:,} parameters per replica",
        f"(the tied embedding counts on both stages), {STEPS - WARMUP} steps, {PAIRS} runs of each. Bytes that one",
        "replica sends per step; the kernel's include TCP, control traffic and the rendezvous.",
        "",
        "| run | ledger, 1-bit | ledger, uncompressed | ratio | kernel, 1-bit | kernel, uncompressed | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, pair in enumerate(pairs):
        cells = []
        for key in keys:
            cells += [f"{pair['onebit'][key]:,.0f}", f"{pair['uncompressed'][key]:,.0f}", f"{ratios[key][number]:.2f}"]
        lines.append(f"| {number + 1} | " + " | ".join(cells) + " |")
    lines += ["", "Within a replica, not across the pair, by the ledger, the same in both runs:", ""]
    onebit = pairs[0]["onebit"]
    lines += [f"- {kind}: {onebit[f'{kind}_bytes_per_step']:,.0f}" for kind in ("tied", "activations", "control")]
    (RESULTS / "exchange_bytes.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(int(sys.argv[1]))
    else:
        main()
