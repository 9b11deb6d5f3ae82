"""``python -m lrt.eval.core``: what it does is in lrt.commands.core."""

import sys

from lrt.commands.core import main

if __name__ == "__main__":
    sys.exit(main())
