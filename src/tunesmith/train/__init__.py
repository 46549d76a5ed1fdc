"""A run: loop, losses, preflight, checkpoints, resume and guard. Read run.py first."""
