"""`tunesmith verify`: a running server compared with what a run recorded."""
