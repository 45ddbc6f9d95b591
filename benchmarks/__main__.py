"""``python -m benchmarks``: run every benchmark in turn."""

from benchmarks import exchange_bytes, import_time

for benchmark in (import_time, exchange_bytes):
    benchmark.main()
