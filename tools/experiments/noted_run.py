"""A part of several_gpus.py: ``recipes/run.py`` that notes in ``PIECES.<rank>`` which pieces of documents it reads.

One line a micro-batch. A piece is a file, a row group, a document, and where in the document it begins.
"""

import os
import sys

import torch

from lrt.commands.train import main
from lrt.data import Batch
from lrt.data import batch as batches
from lrt.train import trainer

batches.NAMED_PIECES = sys.maxsize  # otherwise a row names the first few alone
to_device = trainer._to_device
notes = open(f"{os.environ['PIECES']}.{os.environ.get('RANK', '0')}", "a", buffering=1)


def noted(batch: Batch, device: torch.device) -> Batch:
    parts = [part.rpartition(": ") for row in batch.source for part in row.split("; ")]
    notes.write("\t".join(f"{name}:{piece}" for name, _, pieces in parts for piece in pieces.split(", ")) + "\n")
    return to_device(batch, device)


trainer._to_device = noted

if __name__ == "__main__":
    sys.exit(main())
