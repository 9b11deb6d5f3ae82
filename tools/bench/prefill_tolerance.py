"""``lrt bench prefill_tolerance`` from a checkout, installed or not: what it does is in lrt.commands.bench.prefill_tolerance."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lrt.commands.bench.prefill_tolerance import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
