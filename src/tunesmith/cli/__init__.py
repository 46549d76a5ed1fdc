"""The command line: parse arguments, run verbs, print results."""
