"""The run: read run.py first."""
