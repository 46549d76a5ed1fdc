"""Rows to token ids to packs: read, parse, render, check, sample and pack. No torch outside
collate.py."""
