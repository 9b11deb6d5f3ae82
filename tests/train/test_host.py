"""Threads on the host, and what a run says of waiting for data."""

import pytest
import torch

from lrt.train.monitor.host import data_was_the_limit, host_threads, share_waited


@pytest.mark.parametrize(
    ("device", "given", "variable", "expected"),
    [
        ("cuda", None, None, 1),
        ("cuda", 3, None, 3),
        ("cuda", None, "2", 2),
        ("cuda", 3, "2", 3),
        ("cpu", None, None, 2),
        ("cpu", 3, None, 3),
    ],
)
def test_a_process_with_a_gpu_copies_with_one_thread_unless_told_otherwise(
    monkeypatch, device, given, variable, expected
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(2)
    with host_threads(torch.device(device), threads=given):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), host_threads(torch.device(device), threads=5):
        raise KeyError
    assert torch.get_num_threads() == 2


def test_waiting_is_a_share_of_the_time():
    assert share_waited([]) == 0

    def step(seconds, share, schedule="baseline"):
        return {"kind": "train", "schedule": schedule, "tokens_per_second": 64 / seconds, "data_wait": share}

    compiles = [step(100, 0.0), step(50, 0.9, "refine(1)")]
    assert share_waited([*compiles, step(1, 0.5), {"kind": "evaluation"}, step(3, 0.1, "refine(1)")]) == pytest.approx(
        0.2
    )
    assert data_was_the_limit(0.049, workers=0) is None
    assert "20 % of the time" in data_was_the_limit(0.2, workers=3) and "data.workers (now 3)" in data_was_the_limit(
        0.2, workers=3
    )
