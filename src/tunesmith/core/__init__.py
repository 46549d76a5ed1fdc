"""Shared by all layers: types, events, errors, the run folder, atomic files, hardware,
formatting. No torch."""
