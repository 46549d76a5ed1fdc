"""Advice by rules over stated facts."""
