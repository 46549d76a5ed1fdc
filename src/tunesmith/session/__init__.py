"""A recipe resolved: its inputs read and its model loaded."""
