"""``lrt arithmetic`` from a checkout, installed or not: what it does is in lrt.commands.arithmetic."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lrt.commands.arithmetic import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
