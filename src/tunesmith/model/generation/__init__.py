"""Generating answers: batches, sampling, grammars."""
