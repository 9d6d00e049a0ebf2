"""What several methods are made of: calibration text, walking layer by layer, grids, training steps."""
