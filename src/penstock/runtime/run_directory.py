"""What lies where in a run's directory."""

from typing import Final

CONFIG_NAME: Final = "config.json"
"""The run's configuration, as it was checked."""
METRICS_NAME: Final = "metrics.jsonl"
"""A line for each step."""
CHECKPOINTS_NAME: Final = "checkpoints"
"""Directory of the checkpoints, one directory each."""
SUMMARY_NAME: Final = "summary.json"
"""What was spent, and the held-out loss."""
ORDER_NAME: Final = "order"
"""Directory of a curriculum's sorted samples."""
CORPUS_NAME: Final = "corpus"
"""The demo's corpus."""
