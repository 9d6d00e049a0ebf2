"""How a model is used, as a load to measure under: one file per scenario."""
