"""The network: its architecture, its cost, and its life as a Hugging Face directory."""
