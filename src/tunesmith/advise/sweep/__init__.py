"""Sweeps: trials over a recipe's `sweep`, selected on eval_data; read run_sweep.py."""
