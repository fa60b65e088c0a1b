"""What a transformers model is made of, found by type and shape."""
