"""LRT inside torchtitan's own trainer: importing this registers ``lrt`` and ``lrt_llama3`` with torchtitan 0.2.2.

    torchrun -m torchtitan.train --job.config_file recipes/titan_lrt_debug.toml --experimental.custom_import lrt.titan

``JobConfig`` adds the tables [recurrence] and [schedule] of our recipes: ``job.custom_config_module = "lrt.titan"``.
"""

from lrt.commands.torchtitan import check_torchtitan

check_torchtitan()

from lrt.titan.spec import JobConfig  # noqa: E402

__all__ = ["JobConfig"]
