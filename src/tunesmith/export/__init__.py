"""A finished run in the formats of other engines, proven equal."""
