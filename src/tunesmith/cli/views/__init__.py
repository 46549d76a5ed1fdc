"""The tables and views of the terminal."""
