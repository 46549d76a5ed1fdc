"""Write a finished run for other engines, and check it against the run's own answers."""
