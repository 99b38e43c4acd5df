"""`python -m lamoe` is the command line."""

import sys

from lamoe.cli import main

sys.exit(main())
