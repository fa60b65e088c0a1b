"""Tensor arithmetic; knows no module, no config, no model."""
