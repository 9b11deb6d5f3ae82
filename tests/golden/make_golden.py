"""Golden numbers from the official LRT code, for the parity tests of `lrt`.

The fixtures beside this file were made with

    OMP_NUM_THREADS=1 python tests/golden/make_golden.py --official /path/to/Latent_recurrent_transformer

on commit e0d0f6e647c07a93d2b4b6f5bd328a8d5afbc7be of github.com/OoDBag/Latent_recurrent_transformer, torch 2.13 (CPU,
float32, eager). The official code is imported, never copied; it needs filelock, pyarrow, requests, tiktoken and
tokenizers. README.md says how to read the files:

    weights_*.safetensors   state dicts, official names; matrices as float8_e4m3fn: `.float()` is the exact fp32 weight
    {layout}.safetensors    tokens, targets (-1 = ignored), token_bytes, and every expected tensor
    {layout}.json           GPTConfig, weights file, keys to drop from it, every expected number, float32 noise

Every case runs twice and must agree bit for bit. `noise` is the largest difference to the same run in float64.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the official optimizer kernels are decorated with torch.compile
import torch
from official import import_official, random_parameters
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
SMALL = dict(vocab_size=100, n_embd=64)  # the vocabulary is padded to 128 rows
TWO_HEADS = dict(SMALL, n_head=2, n_kv_head=2, ve_gate_channels=32, sequence_len=26)  # short windows reach back 13
MHA = dict(TWO_HEADS, n_layer=3, window_pattern="SL", use_interleaved=True)
GQA = dict(SMALL, n_head=4, n_kv_head=2, ve_gate_channels=0, sequence_len=24, n_layer=3, window_pattern="L")
BASELINE = dict(TWO_HEADS, n_layer=4, window_pattern="SSL")
LAYOUTS = {  # name: (weights file, tokens per row, GPTConfig)
    "lrt_mha": ("lrt_mha", 25, MHA),
    "lrt_gqa": ("lrt_gqa", 24, dict(GQA, use_interleaved=True)),
    "lrt_no_scales": ("lrt_mha", 26, dict(MHA, use_x0_residual=False, use_resid_lambdas=False)),
    "baseline_ve_every_layer": ("baseline", 25, dict(BASELINE, ve_every_layer=True)),
    "baseline_ve_alternating": ("baseline", 25, BASELINE),
    "baseline_no_ve": ("baseline", 25, dict(BASELINE, use_value_embeds=False)),
}
FULL = ("lrt_mha", "lrt_gqa", "baseline_ve_every_layer")  # the layouts that use every key of their weights file


def compact(tensor):
    """One byte an element for matrices: exact after `.float()`, because the compact form is what the models load."""
    return (tensor.to(torch.float8_e4m3fn) if tensor.ndim > 1 else tensor).contiguous()


def build(official, config, weights, *, dtype):
    """An official model with the given weights, and the keys of the file that this layout has no use for."""
    model = official.gpt.GPT(official.gpt.GPTConfig(**config))
    model.init_weights()
    own = model.state_dict()
    model.load_state_dict({key: weights[key].float() for key in own})
    for p in model.parameters():  # not model.to(dtype): the rotary tables must stay bfloat16
        p.data = p.data.to(dtype)
    return model, sorted(set(weights) - set(own))


def gradients(model, loss):
    """[L2 norm, inner product with the parameter] of every gradient; the second notices signs."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    pairs = {name: (p.grad.double(), p.detach().double()) for name, p in model.named_parameters()}
    return {name: [g.norm().item(), (g * p).sum().item()] for name, (g, p) in pairs.items()}


def group_loss(out, targets):
    """The passes in spec.md's weighting: a sweep is ONE group, the mean over its valid targets, with weight S."""
    first, *subsets = out["per_pass_losses"]
    counts = [(targets[:, mask] != -1).sum() for mask in out["per_pass_masks"][1:]]
    sweep = sum(n * loss for n, loss in zip(counts, subsets)) / sum(counts)
    return (first + len(subsets) * sweep) / (1 + len(subsets))


def refine(model, tokens, targets, passes):
    """Multi-refinement with equal weights, as commit a133a67 does it: full forwards fed the shifted last state."""
    memory, losses = model._make_zero_h_final(tokens), []
    for _ in range(1 + passes):
        loss, state = model(tokens, targets, h_final_prev=memory)
        memory = model._shift_right(state)
        losses.append(loss)
    return dict(loss=sum(losses) / len(losses), per_pass_losses=losses, h_final=state.detach())


@torch.no_grad()
def decode(model, tokens, kv_cache_class):
    """True recurrence with the key/value cache, token by token, as the official sequential evaluation does it."""
    c, dtype, (batch, length) = model.config, model.lm_head.weight.dtype, tokens.shape
    cache = kv_cache_class(batch, c.n_kv_head, length, c.n_embd // c.n_head, c.n_layer, tokens.device, dtype)
    memory, steps = torch.zeros(batch, 1, c.n_embd, dtype=dtype), []
    for t in range(length):
        logits, memory = model(tokens[:, t : t + 1], kv_cache=cache, h_final_prev=memory, return_hidden=True)
        steps.append((logits, memory))
    return [torch.cat(parts, dim=1) for parts in zip(*steps)]


def train(model, compute_loss, *, steps=3):
    """Losses and movement of each parameter over official optimizer steps (bf16 Newton-Schulz: expect 1 %)."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = model.setup_optimizer(embedding_lr=0.3, weight_decay=0.2)  # the rest is its defaults; no schedules
    losses = []
    for _ in range(steps):
        loss = compute_loss()
        model.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return dict(losses=losses, movement={n: (p.detach() - start[n]).norm().item() for n, p in model.named_parameters()})


def baseline_case(official, model, data):
    tokens, targets = data["tokens"], data["targets"]
    loss, state = model(tokens, targets)
    numbers = dict(loss=loss.item(), gradients=gradients(model, loss))
    numbers["bpb"] = official.loss_eval.evaluate_bpb(model, iter([(tokens, targets)]), 1, data["token_bytes"])
    return numbers, dict(logits=model(tokens).detach(), h_final=state.detach()), lambda: model(tokens, targets)[0]


def lrt_case(official, model, data):
    tokens, targets, config = data["tokens"], data["targets"], model.config
    with torch.no_grad():
        zero, _ = model(tokens, h_final_prev=model._make_zero_h_final(tokens), return_hidden=True)
        numbers = dict(none_versus_zero_memory=(model(tokens) - zero).abs().max().item())
    tensors = dict(zero_logits=zero)
    for subsets, refresh in ((3, False), (3, True), (2, True), (2, False)):
        name = f"interleaved_{subsets}{'_kv_refresh' if refresh else ''}"
        config.interleaved_num_passes, config.interleaved_kv_refresh = subsets, refresh
        out = model.forward_interleaved_train(tokens, targets)
        bpb = official.loss_eval.evaluate_bpb(model, iter([(tokens, targets)]), 1, data["token_bytes"])
        numbers[name] = dict(out, bpb=bpb)
    numbers["refine_2"] = refine(model, tokens, targets, 2)
    for name, out in numbers.items():
        if name != "none_versus_zero_memory":
            tensors[f"{name}.h_final"] = out.pop("h_final")
            if "per_pass_masks" in out:
                loss = group_loss(out, targets)
                out["group_loss"], out["group_gradients"] = loss.item(), gradients(model, loss)
                del out["per_pass_masks"]
            out["gradients"] = gradients(model, out["loss"])
            out["loss"], out["per_pass_losses"] = out["loss"].item(), [x.item() for x in out["per_pass_losses"]]
    tensors["decode_logits"], tensors["decode_h_final"] = decode(model, tokens, official.engine.KVCache)
    if model.lm_head.weight.dtype == torch.float32:  # the official sequential evaluation cannot run in float64
        evaluate = official.loss_eval.evaluate_bpb_sequential
        numbers["bpb_sequential"] = evaluate(model, iter([(tokens, targets)]), 1, data["token_bytes"])["bpb"]
    return numbers, tensors, lambda: model.forward_interleaved_train(tokens, targets)["loss"]  # S = 2: set last


def run_layout(official, config, weights, data, *, dtype=torch.float32):
    """Every number and tensor of one layout."""
    model, dropped = build(official, config, weights, dtype=dtype)
    case = lrt_case if config.get("use_interleaved") else baseline_case
    numbers, tensors, compute_loss = case(official, model, data)
    numbers |= dict(dropped=dropped, flops_per_token=model.estimate_flops(), counts=model.num_scaling_params())
    return numbers | (dict(optimizer=train(model, compute_loss)) if dtype == torch.float32 else {}), tensors


def write_layout(official, name, weights_file, length, config):
    generator = torch.Generator().manual_seed(length)
    tokens, targets = torch.randint(0, config["vocab_size"], (2, 2, length), generator=generator).contiguous()
    data = dict(tokens=tokens, targets=targets.clone())
    data["targets"][0, 5:9] = data["targets"][1, 0] = data["targets"][1, -1] = -1
    data["token_bytes"] = (torch.arange(config["vocab_size"]) % 7).int()  # 0 bytes: not scored, like special tokens
    weights = load_file(HERE / weights_file)
    (numbers, tensors), again = [run_layout(official, config, weights, data) for _ in range(2)]
    assert numbers == again[0] and all(torch.equal(tensors[k], again[1][k]) for k in tensors), f"{name} varies"
    exact = run_layout(official, config, weights, data, dtype=torch.float64)[1]
    noise = {key: (tensors[key].double() - exact[key].double()).abs().max().item() for key in tensors}
    save_file({**data, **{key: t.contiguous() for key, t in tensors.items()}}, HERE / f"{name}.safetensors")
    record = dict(commit=official.commit, torch=torch.__version__, weights=weights_file, config=config, noise=noise)
    (HERE / f"{name}.json").write_text(json.dumps({**record, **numbers}, indent=1) + "\n")
    print(name, {key: f"{value:.0e}" for key, value in noise.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of the official repository")
    official = import_official(parser.parse_args().official.resolve())
    torch.set_num_threads(1)
    for seed, (file, _, config) in enumerate(LAYOUTS[name] for name in FULL):
        model = official.gpt.GPT(official.gpt.GPTConfig(**config))
        random_parameters(model, seed=seed)
        save_file({k: compact(v) for k, v in model.state_dict().items()}, HERE / f"weights_{file}.safetensors")
    for name, (file, length, config) in LAYOUTS.items():
        write_layout(official, name, f"weights_{file}.safetensors", length, config)


if __name__ == "__main__":
    main()
