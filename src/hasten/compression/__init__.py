"""Parent to variant: one file per compression method."""
