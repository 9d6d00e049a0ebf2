"""One Lightning loop for pre-training and fine-tuning."""
