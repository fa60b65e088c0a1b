"""Objectives, one a file: what is minimised."""
