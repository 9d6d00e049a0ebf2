"""Questions with answers that can be scored: one file per task."""
