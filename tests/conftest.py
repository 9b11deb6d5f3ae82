"""Settings of the whole suite: float64 nowhere by default, one thread, quick hypothesis runs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent / "lib"))  # what tests share

# as in a shell's background jobs: the processes that tests start would not hear it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("quick", max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("LRT_HYPOTHESIS", "quick"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
