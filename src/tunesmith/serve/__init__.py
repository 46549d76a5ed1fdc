"""The HTTP server: one base model and many adapters behind OpenAI's API (`tunesmith serve`)."""
