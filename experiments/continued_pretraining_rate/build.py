"""Write the same texts as the experiment on rehearsal."""

from __future__ import annotations

from experiments.rehearsal.build import build_data

__all__ = ["build_data"]
