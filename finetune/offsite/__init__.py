"""Offsite-tuning: a model is fine-tuned by somebody who never gets it, on data that its owner never sees."""
