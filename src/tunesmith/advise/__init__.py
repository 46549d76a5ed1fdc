"""Advice: whether to fine-tune, on which rows, and at which learning rate.

rules/              advice from facts, without a model: facts, rubric, advice
measured/           advice from an experiment on the user's items: experiment.py is read first
lr_finder.py        short runs at a few learning rates
curate.py           select a small set of good rows with the base model
sweep/              trials over a recipe's `sweep`: run_sweep.py is read first
"""
