"""The command line: words to recipes, results to text."""
