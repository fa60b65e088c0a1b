"""Export formats, one a file."""
