"""Frozen weights: storage formats, their grids, and what turns a dense weight into them."""
