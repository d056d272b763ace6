"""``python -m tokenferry``."""

import sys

from tokenferry.cli import main

if __name__ == "__main__":
    sys.exit(main())
