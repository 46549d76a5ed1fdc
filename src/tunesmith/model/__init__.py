"""The model: layers, adapters, attention, generation and its files."""
