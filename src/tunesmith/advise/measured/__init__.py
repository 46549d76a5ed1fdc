"""Advice by measurement on the user's rows."""
