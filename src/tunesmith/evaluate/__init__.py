"""Measuring a model: items, metrics, intervals, comparisons."""
