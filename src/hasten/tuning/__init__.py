"""Which weights fine-tuning moves: one file per way."""
