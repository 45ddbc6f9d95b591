"""Leaving a process group."""

import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from penstock.runtime.process import Process


def test_threads_that_still_need_the_interpreter_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's threads drop Python references after the last collective; a process that ends first is aborted."""
    let_go = threading.Event()

    def destroy() -> None:
        def run_loop() -> None:
            time.sleep(0.01)
            let_go.set()

        threading.Thread(target=run_loop, daemon=True).start()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    before = sys.getswitchinterval()
    sys.setswitchinterval(10)  # no thread gets a turn that is not given to it
    try:
        Process(0, 1, torch.device("cpu"), None, owns_group=True).leave()
        assert let_go.is_set()
    finally:
        sys.setswitchinterval(before)
