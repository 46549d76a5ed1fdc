"""Load scripts and modules of experiments/."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

EXPERIMENTS_DIR = Path(__file__).parents[2] / "experiments"


def load_experiment(name: str) -> Any:
    """Return the module experiments/NAME/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS_DIR / name / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def import_module(name: str) -> Any:
    """Return a module of the checkout, such as experiments.claims."""
    root = str(EXPERIMENTS_DIR.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(name)
