"""Values by name, of any kind: tables of JSON and TOML, records of a run, keywords handed on; no torch.

What such a value is, the place that reads it checks. These two are the only tables without a type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = dict[str, Any]
ReadTable = Mapping[str, Any]
