"""``lrt evaluate`` from a checkout, installed or not: what it does is in lrt.commands.evaluate."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from lrt.commands.evaluate import main
except ImportError as missing:
    sys.exit(f"error: {missing}")
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
