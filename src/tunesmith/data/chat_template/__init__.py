"""Chat templates: messages to tokens, with a mask that comes from the render itself."""
