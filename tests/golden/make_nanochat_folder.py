"""A tiny nanochat base folder in the official on-disk layout, for the converter's tests.

Made with

    OMP_NUM_THREADS=1 python tests/golden/make_nanochat_folder.py --official /path/to/Latent_recurrent_transformer

on commit e0d0f6e647c07a93d2b4b6f5bd328a8d5afbc7be. The official code writes it, and reads it back before the logits are
taken. Everything but `expected.safetensors` (tokens, zero-memory logits, h_final) is the official layout:

    nanochat/tokenizer/{tokenizer.pkl, token_bytes.pt}
    nanochat/base_checkpoints/{d2_lrt, d2_baseline}/{model_000100.pt, meta_000100.json, expected.safetensors}
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch
from official import import_official, random_parameters
from safetensors.torch import save_file

ROOT, STEP = Path(__file__).parent / "nanochat", 100
MERGES = ["th", "he", "in", "an", "er", " t", " a", "the", " the", "ing", " in", " and", "on", "re", " s"]
SHAPE = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=64, sequence_len=32, window_pattern="SL", ve_gate_channels=32)


def write_tokenizer(official):
    """256 bytes, a few merges and the official special tokens, pickled by the official class."""
    ranks = {bytes([i]): i for i in range(256)} | {m.encode(): 256 + i for i, m in enumerate(MERGES)}
    special = {name: len(ranks) + i for i, name in enumerate(official.tokenizer.SPECIAL_TOKENS)}
    pattern = official.tokenizer.SPLIT_PATTERN
    encoding = tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = official.tokenizer.RustBPETokenizer(encoding, "<|bos|>")
    tokenizer.save(ROOT / "tokenizer")
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]  # a byte >= 128 alone decodes to U+FFFD
    sizes = [0 if piece in special else len(piece.encode()) for piece in pieces]  # so it counts 3, as official files do
    torch.save(torch.tensor(sizes, dtype=torch.int32), ROOT / "tokenizer" / "token_bytes.pt")
    return tokenizer


def write_checkpoint(official, tokenizer, tag, *, use_interleaved):
    """Save with the official code, load with the official code, and record what the loaded model says."""
    config = official.gpt.GPTConfig(vocab_size=tokenizer.get_vocab_size(), use_interleaved=use_interleaved, **SHAPE)
    model = official.gpt.GPT(config)
    random_parameters(model, seed=7)
    state = model.state_dict()
    for key in state:
        if "wte" in key or "value_embeds" in key:  # bfloat16, as training on CUDA leaves the embeddings
            state[key] = state[key].bfloat16()
    meta = dict(
        step=STEP,
        val_bpb=1.25,
        model_config=asdict(config),
        user_config=dict(run="dummy", depth=2, max_seq_len=32, interleaved=use_interleaved),
        device_batch_size=4,
        max_seq_len=32,
        dataloader_state_dict=dict(pq_idx=0, rg_idx=3, epoch=1),
        loop_state=dict(min_val_bpb=1.25, smooth_train_loss=3.5, total_training_time=12.5),
    )
    folder = ROOT / "base_checkpoints" / tag
    official.checkpoint_manager.save_checkpoint(str(folder), STEP, state, None, meta)
    assert torch.load(folder / f"model_{STEP:06d}.pt", weights_only=True).keys() == state.keys()
    model, *_ = official.checkpoint_manager.load_model("base", torch.device("cpu"), "eval", model_tag=tag)
    tokens = torch.tensor([tokenizer.encode("The thing and the other in there, née ☃", prepend="<|bos|>")])
    memory = model._make_zero_h_final(tokens) if use_interleaved else None
    with torch.no_grad():
        logits, state = model(tokens, h_final_prev=memory, return_hidden=True)
    save_file(dict(tokens=tokens, logits=logits, h_final=state), folder / "expected.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="checkout of the official repository")
    path = parser.parse_args().official.resolve()
    os.environ["NANOCHAT_BASE_DIR"] = str(ROOT)
    official = import_official(path)
    tokenizer = write_tokenizer(official)
    write_checkpoint(official, tokenizer, "d2_lrt", use_interleaved=True)
    write_checkpoint(official, tokenizer, "d2_baseline", use_interleaved=False)


if __name__ == "__main__":
    main()
