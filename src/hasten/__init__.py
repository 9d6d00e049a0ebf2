"""hasten: from text to the fastest language-model variant that still answers right, with proof."""

__version__ = "0.1.0"
