"""Tokenizers: tokenizer.json taken apart into control tokens and plain text to ids."""
