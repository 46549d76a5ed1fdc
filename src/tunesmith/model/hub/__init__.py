"""The files of a model: found, checked, described."""
