"""torchtitan's trainer and ours, from the same weights, on the same rows, under the same settings: the same numbers."""

from __future__ import annotations

import pytest
from titan_runs import MUON, needs_torchtitan, our_recipe, run_jobs, titan_arguments

pytestmark = [pytest.mark.slow, pytest.mark.dist, needs_torchtitan]

SCHEDULES = {
    "interleaved": 'kind = "interleaved"\nsubsets = 2',
    "drawn": 'kind = "interleaved"\nsubsets = 3\nsweeps = 2\norder = "random"',
    "refreshed": 'kind = "interleaved"\nsubsets = 4\nkv_refresh = true\ncut_gradient = true',
    "refine": 'kind = "refine"\npasses = 2\nweights = [0.1, 0.3, 0.6]',
    "settled": 'kind = "refine"\npasses = 1\nweights = [0.0, 1.0]\nsettle = 2',
    "chunked": 'kind = "chunked"\nchunks = 8',
    "sequential": 'kind = "sequential"',
    "mixture": 'kind = "mixture"\nmix = [{share = 0.5, kind = "baseline"}, {share = 0.5, kind = "refine"}]',
    "ramp": 'phases = [{until = 0.3, kind = "baseline"}, {until = 1.0, kind = "refine", ramp = 4}]',
    "phases": 'phases = [{until = 0.4, kind = "baseline"}, {until = 0.7, kind = "refine"}, {until = 1.0, subsets = 2}]',
}
PLAIN = 'kind = "baseline"'
LOSS = 1e-5  # largest difference of a loss in nats
WEIGHT = 1e-4  # and of a weight, which ten steps of AdamW move by up to 2e-2
MUON_WEIGHT = 5e-3  # of up to 5e-2: orthogonalizing a gradient of low rank makes directions of what is rounding


def compare(found, name, *, bound=WEIGHT):
    theirs, ours = found[f"{name} titan"], found[f"{name} ours"]
    assert "error" not in theirs and "error" not in ours, (theirs.get("error"), ours.get("error"))
    assert len(theirs["losses"]) == len(ours["losses"]) == 10
    assert max(abs(a - b) for a, b in zip(theirs["losses"], ours["losses"])) <= LOSS
    assert theirs["losses"][-1] < theirs["losses"][0] - 0.5  # they learned
    assert theirs["weights"].keys() == ours["weights"].keys()
    far = {key: float((theirs["weights"][key] - value).abs().max()) for key, value in ours["weights"].items()}
    assert max(far.values()) <= bound, max(far.items(), key=lambda item: item[1])
    return max(abs(a - b) for a, b in zip(theirs["losses"], ours["losses"])), max(far.values())


def pair(folder, name, *, ranks):
    """The same job for both trainers."""
    if name == "plain":
        theirs = titan_arguments(folder / "plain_titan", PLAIN, ranks=ranks, flavor="plain_tiny", recurrence="")
        return {
            "plain titan": {"titan": theirs},
            "plain ours": {"ours": our_recipe(folder / "plain_ours", PLAIN, ranks=ranks, plain=True)},
        }
    return {
        f"{name} titan": {"titan": titan_arguments(folder / f"{name}_titan", SCHEDULES[name], ranks=ranks)},
        f"{name} ours": {"ours": our_recipe(folder / f"{name}_ours", SCHEDULES[name], ranks=ranks)},
    }


def with_muon(folder, *, ranks):
    """Muon and its rates, with momentum and weight decay that change with the step."""
    passes = SCHEDULES["phases"]
    theirs = titan_arguments(folder / "muon_titan", passes, ranks=ranks, optimizer=MUON)
    return {
        "muon titan": {"titan": theirs},
        "muon ours": {"ours": our_recipe(folder / "muon_ours", passes, ranks=ranks, muon=True)},
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_steps_of_muon_agree(tmp_path, ranks):
    found = run_jobs(tmp_path / "jobs", with_muon(tmp_path, ranks=ranks), ranks=ranks)
    loss, weight = compare(found, "muon", bound=MUON_WEIGHT)
    print(f"{ranks} ranks, Muon: loss {loss:.1e}, weight {weight:.1e}")


def test_ten_steps_agree_under_every_schedule(tmp_path):
    jobs = {}
    for name in (*SCHEDULES, "plain"):
        jobs |= pair(tmp_path, name, ranks=1)
    found = run_jobs(tmp_path / "jobs", jobs)
    for name in (*SCHEDULES, "plain"):
        loss, weight = compare(found, name)
        print(f"1 rank, {name}: loss {loss:.1e}, weight {weight:.1e}")


@pytest.mark.parametrize("name", [*SCHEDULES, "plain"])
def test_ten_steps_agree_on_two_ranks(
    tmp_path, name
):  # a torchrun each: a second job of torchtitan's in one process waits for ever
    loss, weight = compare(run_jobs(tmp_path / "jobs", pair(tmp_path, name, ranks=2), ranks=2), name)
    print(f"2 ranks, {name}: loss {loss:.1e}, weight {weight:.1e}")
