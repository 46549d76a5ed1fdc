"""The embedded example: real rows, a recipe, and general text to see what is forgotten. ORIGIN.md says where from."""

from pathlib import Path

RECIPE = Path(__file__).with_name("recipe.yaml")
SHOWN_ROWS = 2
