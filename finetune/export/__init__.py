"""Merge, requantize, write, and prove in a runtime that is not ours."""
