"""What is trained, how it is attached, saved and merged."""
