"""The engine: captures, edits, attention, replay sweeps and generation on the user's own module."""
