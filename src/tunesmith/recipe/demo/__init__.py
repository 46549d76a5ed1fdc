"""The embedded example: real rows, a recipe, and general text that measures forgetting.

ORIGIN.md says where the rows come from."""

from pathlib import Path

DEMO_RECIPE = Path(__file__).with_name("recipe.yaml")
GENERAL_TEXTS = Path(__file__).with_name("general.jsonl")  # retention_data: built-in
NUM_PREVIEW_ROWS = 2
