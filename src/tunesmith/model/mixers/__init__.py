"""Token mixers whose state runs along the tokens, over a PackLayout: see docs/design/mixers.md."""
