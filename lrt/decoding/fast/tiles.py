"""How the work of a decoding step is divided among programs: tiles of products, shares of attention.

Legend: N outputs, K inputs of a product, H query heads, W head width, C slots of a cache.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Work of one program of a product: outputs, inputs a turn, warps, turns in flight."""

    outputs: int
    inputs: int
    warps: int
    stages: int = 1


class Share(NamedTuple):
    """How attention is divided: slots a turn, warps, turns in flight, programs wanted in all,
    registers a thread at most."""

    slots: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None


# Each table: up to these numbers, this choice; the first line that fits counts.
# Swept on one NVIDIA H200 at context 1024 in
# whole steps: 1, 8 and 64 rows of 20 blocks of 1280, 8 rows of 12 blocks of 768 (docs/log.md, 9 and 14).
ANY = 1 << 40
VECTOR_OUTPUTS = ((ANY, 2047, 4), (ANY, ANY, 2))  # one row: outputs, inputs -> outputs of a program
MATRIX_TILES = (  # rows, outputs, inputs
    (16, 2047, 2047, Tile(16, 128, 2, 5)),
    (16, 2047, ANY, Tile(16, 64, 2, 6)),
    (16, 16384, 1023, Tile(32, 128, 4, 3)),
    (16, ANY, ANY, Tile(64, 64, 4, 4)),
    (ANY, 2047, ANY, Tile(16, 128, 4, 3)),
    (ANY, 16384, ANY, Tile(32, 128, 4, 3)),
    (ANY, ANY, ANY, Tile(64, 64, 4, 4)),
)
SHARES = (  # rows x heads, slots of the cache
    (32, ANY, Share(64, 4, 1, 264)),
    (ANY, 4096, Share(32, 4, 2, 660, 96)),
    (ANY, ANY, Share(32, 4, 3, 660, 96)),
)
MOST = 32  # rows that the kernel of few rows takes
FEW = 0  # rows up to which products of half precision hold their weights
FEW_TURNS = 6  # of a warp, whose weights are in flight before the kernel in front has ended
HELD = 40  # weights of one output that a thread holds: more warps otherwise
AHEAD = 1 << 24  # bytes of the MLP's weights that the output projection of a single row brings to L2


def tile_of(rows: int, outputs: int, width: int) -> Tile:
    """The tile of a product of (rows, width) with (outputs, width).

    One row is a sum in which every thread keeps the numbers that it loads, 8 of each 256 inputs a warp; more
    rows are a matrix product.
    """
    if rows == 1:
        wanted = next(choice for n, k, choice in VECTOR_OUTPUTS if outputs <= n and width <= k)
        warps = min(8, power(-(-width // (32 * HELD))))
        held = -(-width // (256 * warps)) * 8
        return Tile(min(wanted, power(-(-wanted * HELD // held))), 256 * warps, warps)
    tile = next(tile for r, n, k, tile in MATRIX_TILES if rows <= r and outputs <= n and width <= k)
    return tile._replace(inputs=max(16, min(tile.inputs, power(width))))


def few_of(rows: int, outputs: int, width: int) -> Tile:
    """The tile of a product of 2 to FEW rows: each warp takes 64 inputs a turn, ``stages`` turns are in flight."""
    warps = min(16, max(2, power(-(-width // (64 * FEW_TURNS)))))
    return Tile(16, 64, warps, min(FEW_TURNS, -(-width // (64 * warps))))


def share_of(pairs: int, slots: int, width: int) -> tuple[int, Share]:
    """Programs that divide the slots of each of ``pairs`` (row, head) among them, and how each goes about it."""
    share = next(share for n, most, share in SHARES if pairs <= n and slots <= most)
    share = share._replace(slots=min(128, max(16, share.slots * 128 // width)))
    return max(1, min(-(-(slots - 1) // share.slots), share.programs // pairs, 64)), share


def power(n: int) -> int:
    """The power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()
