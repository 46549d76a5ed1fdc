"""Advice by rules over facts."""
