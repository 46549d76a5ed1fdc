"""tunesmith decides whether a language model should be fine-tuned, does it right, and proves that it worked."""

__version__ = "0.1.0"
