"""What runs a variant: one file per engine."""
