"""``python -m penstock.compression FILE``: parse arguments, load data, create the algorithm, compress."""

import sys

from penstock.compression.tool import main

if __name__ == "__main__":
    sys.exit(main())
