"""`python -m cover` is the command `cover`."""

import sys

from cover.cli import main

sys.exit(main())
