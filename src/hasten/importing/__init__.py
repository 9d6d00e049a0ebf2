"""Checkpoints that somebody else trained, checked and brought into the form that every stage reads."""
