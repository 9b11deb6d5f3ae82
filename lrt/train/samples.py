"""Text that a model writes during a run and at its end."""

from __future__ import annotations

import contextlib

import torch

from lrt.decoding.generation import generate
from lrt.model import LatentRecurrentModel
from lrt.tables import Table
from lrt.train.checkpoint.weights import export
from lrt.train.run import Run


def record_sample(run: Run) -> None:
    """Record what the model writes at this step; every rank must call this.

    A sharded model is gathered on the CPU of rank 0, where it takes no memory from the training.
    """
    if not run.recipe.evaluation.sample_tokens:
        return
    if run.world.sharded:
        model = export(run.model, run.recipe, None, run.world)
    else:
        model = run.runner.refresh()
    if model is not None:
        training = model.training
        model.eval()
        eager = torch.compiler.set_stance("force_eager") if run.recipe.parallel.compile else contextlib.nullcontext()
        with eager:  # one position at a time is too little to compile
            write_sample(run, decode_sample(model, run))
        model.train(training)
    run.world.barrier()


def write_sample(run: Run, text: str | None) -> None:
    """Hand a sample to the run's sinks."""
    if text is not None:
        prompt = run.recipe.evaluation.sample_prompt
        run.recorder.write({"kind": "sample", "step": run.state.step, "prompt": prompt, "text": text})


def decode_sample(model: LatentRecurrentModel, run: Run) -> str | None:
    """Text after the recipe's prompt, one token after the other, drawn with the run's seed; None for no tokens."""
    config = run.recipe.evaluation
    if not config.sample_tokens:
        return None
    device = next(model.parameters()).device
    prompt = [run.tokenizer.bos_id, *run.tokenizer.encode(config.sample_prompt)]
    generator = torch.Generator(device=device).manual_seed(run.recipe.run.seed)
    ids = torch.tensor([prompt], device=device)
    options: Table = {"temperature": 0.8, "top_k": 40, "generator": generator}
    out = generate(model, ids, max_new_tokens=config.sample_tokens, **options)
    return run.tokenizer.decode(out[0].tolist()[1:])
