"""The guard: probes, detectors, rollback, and the loop that they watch."""
