"""Text to pre-train on: one file per source."""
