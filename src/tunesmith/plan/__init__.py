"""The plan: every value with who decided it and why. No torch."""
