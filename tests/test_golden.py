"""Our core against numbers that the official code gave once (tests/golden/README.md says how).

Every layout is loaded through the converter's name table, so these tests also prove that table. The tolerances
stand a small factor above the float32 noise that the fixtures record.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lrt
from lrt.conversion.official import name_table, native_from_official, native_tensors
from lrt.loss import IGNORE
from lrt.outcome import in_order
from lrt.serialization import model_from_config
from lrt.serialization.tensors import in_memory

GOLDEN = Path(__file__).parent / "golden"
RECURRENT = ("lrt_mha", "lrt_gqa", "lrt_no_scales")
BASELINES = ("baseline_ve_every_layer", "baseline_ve_alternating", "baseline_no_ve")
DEFAULTS = {"ve_gate_channels": 32, "interleaved_num_passes": 2}
SCHEDULES = {
    "interleaved_2": lrt.interleaved(2),
    "interleaved_3": lrt.interleaved(3),
    "interleaved_2_kv_refresh": lrt.interleaved(2, kv_refresh=True),
    "interleaved_3_kv_refresh": lrt.interleaved(3, kv_refresh=True),
    "refine_2": lrt.refine(2),
}
LOGITS, STATES, LOSSES, GRADIENTS = 1e-4, 3e-5, 1e-5, 1e-4  # absolute, absolute, absolute, relative to the norm


class Case:
    """One layout: our model with the official weights, and everything the official code said about it."""

    def __init__(self, name):
        self.numbers = json.loads((GOLDEN / f"{name}.json").read_text())
        self.data = load_file(GOLDEN / f"{name}.safetensors")
        weights = load_file(GOLDEN / self.numbers["weights"])
        official = in_memory({k: v.float() for k, v in weights.items() if k not in self.numbers["dropped"]})
        config = native_from_official(DEFAULTS | self.numbers["config"], official, where=name)
        self.model = model_from_config(config)
        self.model.load_state_dict(
            {k: t.read().clone() for k, t in native_tensors(config, official, where=name).items()}
        )
        self.tokens = self.data["tokens"]
        self.targets = self.data["targets"].masked_fill(self.data["targets"] == -1, IGNORE)

    def pass_means(self, schedule):
        """Mean nats of every pass, as the official code reports them."""
        means = []
        for result in self.model.run(self.tokens, schedule):
            targets = self.targets[:, result.plan.positions]
            means.append(self.model.backbone.loss(result.hidden, targets)[0] / (targets != IGNORE).sum())
        return torch.stack(means)

    def last_state(self, schedule):
        """h_final of every position, from the last pass that computed it."""
        results = self.model.run(self.tokens, schedule)
        last = [r for r in results if r.plan.group == results[-1].plan.group]
        places = torch.arange(self.tokens.shape[1])
        return in_order(torch.cat([r.memory for r in last], dim=1), torch.cat([places[r.plan.positions] for r in last]))

    def gradients(self, loss):
        """Official name -> [L2 norm, inner product with the parameter]."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        ours = {n: (p.grad.double(), p.detach().double()) for n, p in self.model.named_parameters()}
        table = name_table(self.model.backbone.config, recurrent=self.model.recurrence is not None)
        pairs = {theirs: [torch.cat([ours[n][i] for n in names]) for i in (0, 1)] for theirs, names in table.items()}
        return {name: [g.norm().item(), (g * p).sum().item()] for name, (g, p) in pairs.items()}


@pytest.fixture(scope="module")
def case(request):
    return Case(request.param)


def every(layouts):
    return pytest.mark.parametrize("case", layouts, indirect=True)


def largest_difference(ours, theirs):
    return (ours.detach() - theirs).abs().max().item()


def gradient_difference(ours, theirs):
    """Largest difference of norms and inner products, relative to the gradient's norm."""
    assert ours.keys() == theirs.keys()
    return max(abs(a - b) / (theirs[name][0] + 1e-6) for name in theirs for a, b in zip(ours[name], theirs[name]))


@every(RECURRENT)
def test_zero_memory_logits(case):
    assert (
        largest_difference(case.model(case.tokens, schedule=lrt.baseline()).logits, case.data["zero_logits"]) < LOGITS
    )


@every(RECURRENT)
def test_recurrent_decoding(case):
    with torch.no_grad():
        out = case.model(case.tokens, schedule=lrt.sequential())
    assert largest_difference(out.logits, case.data["decode_logits"]) < LOGITS
    assert largest_difference(out.memory, case.data["decode_h_final"]) < STATES


@every(RECURRENT)
@pytest.mark.parametrize("name", SCHEDULES)
def test_states_and_loss_of_every_pass(case, name):
    expected, schedule = case.numbers[name], SCHEDULES[name]
    assert largest_difference(case.last_state(schedule), case.data[f"{name}.h_final"]) < STATES
    means = case.pass_means(schedule)
    assert largest_difference(means, torch.tensor(expected["per_pass_losses"])) < LOSSES
    assert gradient_difference(case.gradients(means.mean()), expected["gradients"]) < GRADIENTS


@every(RECURRENT)
@pytest.mark.parametrize("name", SCHEDULES)
def test_our_loss_is_the_official_one_by_groups(case, name):
    """Official weights count passes, ours count groups (docs/method.md, section 2);
    for refinement both are the same."""
    expected, loss = case.numbers[name], case.model(case.tokens, case.targets, schedule=SCHEDULES[name]).loss
    grouped = ("group_loss", "group_gradients") if "group_loss" in expected else ("loss", "gradients")
    assert abs(loss.item() - expected[grouped[0]]) < LOSSES
    assert gradient_difference(case.gradients(loss), expected[grouped[1]]) < GRADIENTS


@every(BASELINES)
def test_baseline(case):
    out = case.model(case.tokens, case.targets, return_logits=True)
    assert case.model.recurrence is None
    assert largest_difference(out.logits, case.data["logits"]) < LOGITS
    state = F.rms_norm(case.model.run(case.tokens, lrt.baseline())[-1].hidden, (case.model.backbone.width,))
    assert largest_difference(state, case.data["h_final"]) < STATES
    assert abs(out.loss.item() - case.numbers["loss"]) < LOSSES
    assert gradient_difference(case.gradients(out.loss), case.numbers["gradients"]) < GRADIENTS


@every(RECURRENT + BASELINES)
def test_bits_per_byte(case):
    """Of the initialization forward and of the last pass; targets of 0 bytes are not scored."""
    sizes = case.data["token_bytes"].long()[case.targets.clamp_min(0)] * (case.targets != IGNORE)
    for name in [n for n in SCHEDULES if n in case.numbers and "bpb" in case.numbers[n]] or ["bpb"]:
        schedule = SCHEDULES.get(name, lrt.baseline())
        nats = case.model.score(case.tokens, case.targets, schedule)[-1].double()[sizes > 0].sum()
        expected = case.numbers[name] if name == "bpb" else case.numbers[name]["bpb"]["bpb"]
        assert abs(nats.item() / (0.6931471805599453 * sizes.sum().item()) - expected) < LOSSES


@every(("lrt_gqa",))
def test_exact_tables_are_another_model(case):
    """The official rotary tables are bfloat16: with exact ones the logits differ, so the option is not idle."""
    config = json.loads(
        json.dumps(
            {"model": case.model.backbone.config.__dict__, "recurrence": case.model.recurrence.__dict__, "schedule": {}}
        )
    )
    config["model"]["rope_dtype"] = "float32"
    exact = model_from_config(config)
    exact.load_state_dict(case.model.state_dict())
    assert 1e-3 < largest_difference(exact(case.tokens, schedule=lrt.baseline()).logits, case.data["zero_logits"]) < 1.0
