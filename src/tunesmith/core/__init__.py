"""What every layer stands on: types, events, errors, the run folder, atomic files, hardware,
formatting. No torch."""
