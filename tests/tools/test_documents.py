"""The documents: pages made from the code are whole, and every link of every page leads somewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hf_decoders import make
from pages import ROOT, blocks
from runs import TINY, tiny

import lrt
from lrt.__main__ import COMMANDS
from lrt.config.settings import Recipe
from lrt.data import load_tokenizer
from lrt.train.horizon import shards_of
from lrt.train.trainer import train


@pytest.fixture(scope="module")
def reference():
    """docs/reference.py, which is no package."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("reference_of_docs", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "lrt" / "py.typed").read_bytes() == b""


# ------------------------------------------------------------------ pages made from the code


def sections():
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        options = (hints[field.name], *get_args(hints[field.name]))
        yield field.name, next(option for option in options if dataclasses.is_dataclass(option))


def test_every_key_of_a_recipe_has_values_and_a_meaning(reference):
    tables = [(title.strip("[]").split(".")[0], cls) for title, cls in reference.TABLES.items()]
    for section, cls in [*sections(), *tables]:
        keys = reference.keys_of(section, cls)
        assert [key.name for key in keys] == [field.name for field in dataclasses.fields(cls)]
        for key in keys:
            assert key.values and key.meaning, f"{section}.{key.name}: say its meaning in a comment beside the field"


def test_the_page_of_keys_says_range_default_and_meaning(reference):
    page = reference.recipe_page()
    row = (
        "| `warmdown_fraction` | number of 0 or more, at most 1 | `0.5` | share of the steps in which the rates fall |"
    )
    assert row in page.splitlines()
    assert (
        '| `sharing` | `"shared"`, `"layerwise"` | `"shared"` | one pair of memory projections, or one per block |'
        in page
    )
    for title in [f"## [{section}]" for section, _ in sections()] + [f"## {title}" for title in reference.TABLES]:
        assert title in page.splitlines()


def test_the_page_of_keys_that_the_repository_keeps_is_the_newest(reference):
    assert reference.KEPT.read_text(encoding="utf-8") == reference.recipe_page(), "run: python docs/reference.py"


def test_every_command_is_shown_as_its_help(reference):
    page = reference.commands_page()
    for name in COMMANDS:
        assert f"usage: lrt {name}" in page
    assert "--recipe RECIPE" in page


def test_every_public_name_is_in_the_api(reference):
    page = reference.api_page()
    assert [name for name in lrt.__all__ if f"::: lrt.{name}\n" not in page] == ["prefill"]
    assert "::: lrt.decoding.prefill\n" in page  # a module: shown with its functions


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    """CONTRIBUTING.md's command, with the extra docs; every page of the nav is a page of the site."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(build, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    pages = re.findall(r": (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pages) > 20 and all((tmp_path / f"{page}.html").is_file() for page in pages)


# ------------------------------------------------------------------ blocks of Python


def run_page(page: str, scope: dict | None = None, *, without: str = "!never!") -> list[str]:
    """Run every block of a page, one after the other, as a reader would; what each of them prints.

    Args:
        scope: names that the page does not make itself.
        without: blocks that hold this are not run.
    """
    scope, printed = {} if scope is None else scope, []
    for block in (block for block in blocks(page, holding="") if without not in block):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(block, scope)  # noqa: S102
        printed.append(said.getvalue())
    return printed


def results(page: str) -> list[str]:
    """The blocks of text of a page: what it says that its code prints."""
    return re.findall(r"```text\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_worked_example_prints_what_the_page_says():
    """Eight tokens in plain torch; the second block compares lrt with it pass by pass."""
    try:
        assert run_page("method.md") == results("method.md")
    finally:
        torch.set_default_dtype(torch.float32)
    first = blocks("method.md", holding="")[0]
    assert "lrt" not in first and len([line for line in first.splitlines() if line]) <= 40


def test_examples_of_extending_print_what_the_page_says(tmp_path, monkeypatch):
    """A block, a decoder, states and the trainer as a library; a run says more before its last line."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    for printed, says in zip(run_page("extend.md", scope), results("extend.md"), strict=True):
        assert printed.endswith(says)
    assert scope["losses"].of_steps[-1] < scope["losses"].of_steps[0]
    block, hidden, width = scope["block"], scope["hidden"], scope["width"]
    message = r"memory is a tensor \(2, 8, 32\): give lrt.MemoryInput"
    with pytest.raises(ValueError, match=message):
        block(hidden, hidden, None, None)
    with pytest.raises(ValueError, match="Linear has no enter, project, attend: a block that receives memory needs"):
        lrt.RecurrentBlock(torch.nn.Linear(width, width))


def test_the_first_page_works_as_it_says():
    assert run_page("index.md") == results("index.md")
    words = re.findall(r"lrt train --recipe (\S+)(.*)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert len(words) == 3
    for name, rest in words:
        lrt.load_recipe(name.strip("`."), overrides=re.findall(r"--set (\S+)", rest))


def test_examples_of_adapting_run(tmp_path, monkeypatch):
    """Tiny decoders stand for the pretrained ones; trainers of others have tests of their own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

    monkeypatch.chdir(tmp_path)
    kinds, read = {"smollm2": "llama", "gemma-3": "gemma3", "gpt2": "gpt2"}, AutoModelForCausalLM.from_pretrained

    def pretrained(name, **options):
        return make(kinds[name], dtype=torch.float32) if name in kinds else read(name, **options)

    tokens = BatchEncoding({"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9, dtype=torch.int64)})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: lambda text, return_tensors: tokens)
    scope = {}
    for block in blocks("adapt.md", holding="")[:4]:
        exec(block, scope)  # noqa: S102
    assert scope["model"] is not None and type(scope["decoder"]).__name__ == "LlamaForCausalLM"
    assert all((tmp_path / name / "config.json").is_file() for name in ("smollm2-lrt", "folder", "memory"))


def test_examples_of_generating_run(tmp_path, monkeypatch):
    """All but the one that needs a GPU; the names that the page leaves to its reader are given here."""
    monkeypatch.chdir(tmp_path)
    small = ["model.n_layers=2", "model.width=32", "model.window_pattern=L"]
    lrt.save(lrt.build(lrt.load_recipe("lrt_tiny", overrides=small)), "runs/lrt_tiny/export")
    tokens = torch.randint(256, (3, 64))
    scope = {"prompt": tokens[:1], "question": tokens[:1, :4], "tokens": tokens, "next_tokens": tokens[:, :4]}
    scope |= {"prompts": tokens[:2, :8], "mask": torch.ones(2, 8), "eos": 256, "queue": [tokens[2, :6]]}
    scope["tokenizer"] = load_tokenizer("bytes")
    printed = run_page("generate.md", scope, without="cuda")
    assert "sweeps" in printed[2] and int(scope["more"].state.lengths[0]) == 68 and not scope["queue"]


def test_examples_of_evaluating_run(tmp_path, monkeypatch):
    """A trained run and its documents; the same run twice stands for two."""
    monkeypatch.chdir(tmp_path)
    train(tiny("runs", **{"run.name": "lrt_tiny", "evaluation.sample_tokens": "0"}))
    for name in ("baseline", "lrt"):
        shutil.copytree("runs/lrt_tiny", f"runs/{name}")
    Path("my_text.txt").write_text("The same text, twice.\n\nThe same text, twice.\n" * 20)
    interval, table = run_page("evaluate.md", {"torch": torch})
    assert interval.startswith("Interval(value=") and "decode" in table


def test_the_ten_lines_of_the_readme_run_as_they_stand():
    (block,) = blocks("../README.md", holding="")
    assert len([line for line in block.splitlines() if line]) <= 10
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(block, {})  # noqa: S102
    assert said.getvalue() == "torch.Size([1, 52])\n"


def test_commands_of_the_page_about_hosts_are_recipes():
    """Every recipe that the page names plans for the GPUs it names, with the overrides it gives."""
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8").replace("\\\n", " ").replace('"$SLURM_NNODES"', "2")
    found = re.findall(r"(?:lrt|-m lrt) train --recipe (lrt_\w+)([^\n`]*)", page)
    assert len(found) == 5
    for name, rest in found:
        recipe = lrt.load_recipe(name, overrides=re.findall(r"--set (\S+)", rest))
        assert shards_of(recipe.parallel, 16) == 16 // recipe.parallel.replicate


@pytest.mark.slow
@pytest.mark.dist
def test_two_agents_of_torchrun_are_two_hosts(tmp_path):
    """docs/hosts.md: the same command on every host, then one process goes on where both stopped."""
    (tmp_path / "r.toml").write_text(TINY)
    run = ["-m", "lrt", "train", "--recipe", str(tmp_path / "r.toml"), "--set", f"run.output={tmp_path}", "--set"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free.getsockname()[1]}", "--rdzv_id=mine"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meet]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    asked = {"env": given, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    hosts = [subprocess.Popen([*agent, *run, "training.steps=4"], **asked) for _ in range(2)]
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    alone = subprocess.run([sys.executable, *run, "training.steps=6"], timeout=300, check=False, **asked)
    assert alone.returncode == 0 and re.search("resumed from .*step_00000004", alone.stdout), alone.stdout


def test_the_recipe_of_the_page_about_own_data_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "twin.toml").write_text(f'recurrence = false\n{text}\n[schedule]\nkind = "baseline"\n')
    mine, twin = (lrt.load_recipe(tmp_path / f"{name}.toml") for name in ("mine", "twin"))
    assert mine.model == twin.model and mine.recurrence is not None and twin.recurrence is None


# ------------------------------------------------------------------ claims, measurements and the log


def test_numbers_of_the_readme_stand_on_the_pages_that_it_names():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| \[.+?\]\(([^)#]+)[^)]*\) \|$", readme, re.MULTILINE)
    numbers = [(number, page) for _, claimed, page in rows for number in re.findall(r"\d+\.\d+", claimed)]
    assert len(rows) == 12 and len(numbers) > 10
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for _, _, page in rows}
    assert [(number, page) for number, page in numbers if number not in pages[page]] == []
    families = pages["docs/adapt.md"].split("<!-- families -->")[1].split("<!-- /families -->")[0]
    configurations = families.count("| logits, loss, gradients bit for bit |")
    assert f"bit for bit in {configurations} configurations" in readme


def test_the_log_is_newest_first_and_its_index_names_every_entry():
    page = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (\d+)\. (.+): (worked|did not|open)$", page, re.MULTILINE)
    numbers = [int(number) for number, _, _ in entries]
    assert numbers == list(range(len(numbers), 0, -1))
    rows = re.findall(r"^\| \[(\d+)\]\(#[^)]+\) \| \d{4}-\d\d-\d\d \| (.+?) \| (.+?) \|", page, re.MULTILINE)
    assert rows == entries and "## Not tried yet: open" in page


def test_measurement_pages_begin_with_their_goals():
    for page in ("frontier", "results", "tracking", "benchmarks", "decoding", "attention", "prefill"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "Goals", page


# ------------------------------------------------------------------ names and links


def exists(name: str) -> bool:
    """Whether a dotted name is a module of lrt, or something in one; modules of extras are not imported."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        with contextlib.suppress(ModuleNotFoundError):  # its parent is no package
            if importlib.util.find_spec(module) is not None:
                break
    place: object = importlib.import_module(module) if end < len(parts) else None
    for attribute in parts[end:]:
        if not hasattr(place, attribute):
            return False
        place = getattr(place, attribute)
    return True


def test_names_and_files_that_the_pages_speak_of_exist():
    """The log keeps the names of its days."""
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    texts = {page.name: page.read_text(encoding="utf-8") for page in pages if page.name != "log.md"}
    names = {(name, page) for page, text in texts.items() for name in re.findall(r"\blrt(?:\.[A-Za-z_]\w*)+", text)}
    assert len(names) > 60 and [(name, page) for name, page in sorted(names) if not exists(name)] == []
    shown = re.compile(r"\b(?:lrt|recipes|tools|tests)/[\w/]+\.(?:py|toml|md)\b")
    files = {(file, page) for page, text in texts.items() for file in shown.findall(text)}
    lost = [(file, page) for file, page in sorted(files) if not (ROOT / file).exists() and "NAME" not in file]
    assert len(files) > 40 and lost == []
    assert exists("lrt.prefill.run") and not exists("lrt.prefill.walk") and not exists("lrt.no_such_module.x")


# ------------------------------------------------------------------ links


def without_code(text: str) -> str:
    text = re.sub(r"^( *)```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code.group()), text)


def anchors(text: str) -> set[str]:
    """What may stand behind # in a link to a page: its headings as GitHub and mkdocs both spell them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {slug if n == 0 else f"{slug}-{n}" for slug, count in found.items() for n in range(count)}


def test_every_link_of_every_page_leads_somewhere():
    """Relative links and anchors of all pages, as they are in the repository; no network."""
    folders = (ROOT / name for name in ("docs", "lrt", "recipes", "tests", "tools"))
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    assert ROOT / "docs" / "index.md" in texts
    broken, seen = [], 0
    for page, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
            if re.match(r"[a-z]+:", target):
                continue
            seen += 1
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and file in texts and anchor not in anchors(texts[file])):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken and seen > 50


def test_a_link_to_nowhere_would_be_seen():
    page = "# A title, `code` and [a link](x.md)\n\n## Twice\n\n## Twice\n\n```python\n# no heading\n[no](link)\n```\n"
    assert anchors(page) == {"a-title-code-and-a-link", "twice", "twice-1"} and "no" not in without_code(page)
