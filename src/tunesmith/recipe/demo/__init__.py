"""The embedded example: real rows, a recipe, and general text to see what is forgotten. ORIGIN.md
says where from."""

from pathlib import Path

DEMO_RECIPE = Path(__file__).with_name("recipe.yaml")
NUM_PREVIEW_ROWS = 2
