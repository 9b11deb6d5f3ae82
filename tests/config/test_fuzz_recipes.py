"""A fuzzer of recipes and overrides: each is a recipe that dumps, parses and plans, or one short ValueError,
in seconds."""

from __future__ import annotations

import typing
from dataclasses import fields

import pytest
from fuzzing import ODD, shown, tries

from lrt.config import Recipe, dump_recipe, load_recipe, parse_recipe, shipped_recipes
from lrt.train.dry_run import dry_run

LONGEST = 42_000  # characters of a message: twenty mistakes of 2,000


def keys() -> list[str]:
    hints = typing.get_type_hints(Recipe)
    known = {
        f.name: next(c for c in (typing.get_args(hints[f.name]) or (hints[f.name],)) if c is not type(None))
        for f in fields(Recipe)
    }
    return [f"{section}.{f.name}" for section, cls in known.items() for f in fields(cls)]


KEYS = keys()


def odd_key(drawn):
    key = drawn.choice(KEYS)
    bent = [key.upper(), key + "s", key.replace(".", ""), key.replace(".", ".."), "a" + "." * 50_000, "", "\n", "ü.é"]
    return drawn.choice([key, key, drawn.choice(bent)])


def mutated(text, drawn):
    """The text of a file, changed in one place."""
    lines, data = text.splitlines(keepends=True), text.encode()
    at, line = drawn.randrange(len(data)), drawn.randrange(len(lines))
    section, _, key = odd_key(drawn).partition(".")
    return drawn.choice(
        [
            lambda: data[:at],
            lambda: data[:at] + bytes([drawn.randrange(256)]) + data[at + 1 :],
            lambda: data[:at] + data[at + drawn.randrange(1, 30) :],
            lambda: "".join(lines[:line] + lines[line + 1 :]).encode(),
            lambda: "".join(lines[:line] + [lines[line]] + lines[line:]).encode(),
            lambda: "".join(drawn.sample(lines, len(lines))).encode(),
            lambda: data + f"\n[{section}]\n{key} = {drawn.choice(ODD)}\n".encode(errors="replace"),
            lambda: f"{drawn.choice(['base', section, key])} = {drawn.choice(ODD)}\n".encode(errors="replace") + data,
            lambda: text.encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.replace(b"=", b"", 1),
            lambda: data,
        ]
    )()


@pytest.mark.slow
@pytest.mark.timeout(0)  # the budget ends it
def test_recipes_and_overrides(tmp_path):
    texts = [path.read_text(encoding="utf-8") for path in shipped_recipes()]
    planned = 0
    for at, drawn in tries(limit_s=60):
        data = mutated(drawn.choice(texts), drawn)
        (tmp_path / "r.toml").write_bytes(data)
        overrides = [f"{odd_key(drawn)}={drawn.choice(ODD)}" for _ in range(drawn.choice([0, 1, 1, 2, 3]))]
        about = (at, shown(overrides), shown(data, 2000))
        try:
            recipe = load_recipe(tmp_path / "r.toml", overrides=overrides)
            assert parse_recipe(dump_recipe(recipe)) == recipe, about
            planned += 1
            assert "GiB" in dry_run(recipe, world_size=drawn.choice([None, 1, 2, 3, 8])), about
        except ValueError as error:
            assert len(str(error)) < LONGEST and str(error).count("\n") == str(error).count("\n  "), (
                about,
                shown(str(error)),
            )
        except Exception as error:
            raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
    assert planned
