"""Whole files from which fuzzing sets out."""

import json
import struct

SEEDS = {
    "idx": [
        bytes([10])
        + b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, 2, 2)
        + struct.pack("<2i2q2q", 3, 2, 0, 6, 0, 2)
        + modes
        for code in range(1, 10)
        for modes in (b"", b"\0\1")
    ],
    "manifest": [
        json.dumps(
            {
                "kind": "penstock analysis",
                "metrics": ["m"],
                "num_samples": 2,
                "num_tokens": None,
                "fingerprint": "x",
                "format": "penstock checkpoint",
                "version": 1,
                "step": 3,
                "files": {"config.json": {"bytes": 3, "sha256": "0" * 64}, "m.values.npy": {"bytes": 0, "sha256": ""}},
            }
        ).encode(),
        b'{"files": {}}',
    ],
    "config": [
        b"train: {global_batch_size: 4, micro_batch_size: 2, steps: 1e3}\nmodel: {vocab_size: 10, context: 8}\n",
        b"strategy: curriculum\ncurriculum: {metrics: {m: {values: [1, 2], schedule_type: fixed_linear}}}\n",
        b'{"data": {"dataset": "x"}, "model": {"name": "a:b"}, "training": {"mode": "eval"}}',
        b"a: &a [1, 2]\nb: *a\n? [1, 2]\n: !!binary YQ==\nc: 2001-01-01\n",
    ],
}
