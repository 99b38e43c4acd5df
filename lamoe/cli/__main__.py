"""`python -m lamoe.cli` runs the command line, like `python -m lamoe`."""

import sys

from lamoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
