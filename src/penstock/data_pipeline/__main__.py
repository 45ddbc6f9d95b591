"""``python -m penstock.data_pipeline CONFIG``: run a pipeline from its configuration file."""

import argparse
import sys
from collections.abc import Sequence

from penstock.data_pipeline.pipeline import run_pipeline
from penstock.data_pipeline.settings import load_configuration
from penstock.data_pipeline.steps import NonFiniteLossError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the pipeline, print what came of it.

    Returns:
        0 on success, 1 where training stopped on a loss that is not finite, 2 on a mistake in the input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m penstock.data_pipeline",
        description="Load data, make a model, train, evaluate or predict, and save the results.",
        epilog="Example: python -m penstock.data_pipeline run.yaml --set training.max_steps=10",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML or JSON file")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        help="override a setting; may be repeated",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    options = parser.parse_args(arguments)
    try:
        config = load_configuration(options.config, options.overrides)
        results = run_pipeline(config)
    except (NonFiniteLossError, ValueError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLossError) else 2
    losses = [result["loss"] for result in results if "loss" in result]
    told = f", last loss {losses[-1]:.4f}, mean loss {sum(losses) / len(losses):.4f}" if losses else ""
    print(f"{config.training.mode}: {len(results)} steps{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
