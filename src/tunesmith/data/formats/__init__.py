"""Rows as examples."""
