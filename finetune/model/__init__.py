"""The assembly line: a checkpoint becomes a frozen model and its tokenizer."""
