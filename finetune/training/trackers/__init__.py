"""Trackers, one a file: where metrics go besides metrics.jsonl."""
