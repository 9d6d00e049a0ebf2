"""Text to token ids: train a tokenizer, or import one."""
