"""`python -m lamoe` runs the command line."""

import sys

from lamoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
