"""``python -m penstock``: the command line, also under ``torchrun -m penstock``."""

from penstock.cli.main import main

if __name__ == "__main__":
    main()
