"""A recipe resolved: inputs, loaded model, fingerprint, provenance, doctor. No server."""
