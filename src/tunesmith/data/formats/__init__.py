"""Rows of any supported format to examples."""
