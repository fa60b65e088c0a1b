"""Rounders: how the codes of a weight are chosen on its grid; one file each."""
