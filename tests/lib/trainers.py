"""A transformers Trainer on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, 61, (16, 1), generator=generator)
        self.rows = (start + 3 * torch.arange(12)) % 61

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.rows[index],
            "labels": self.rows[index],
            "attention_mask": torch.ones_like(self.rows[index]),
        }


def trainer(model: Any, folder: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "max_steps": 12, "save_steps": 6, "logging_steps": 100, "seed": 0,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **settings | more)
    return transformers.Trainer(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows())
