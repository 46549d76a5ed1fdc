"""Advice from an experiment on the user's items; experiment.py is read first."""
