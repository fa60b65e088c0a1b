"""Files to rows, rows to conversations, conversations to token ids and label masks, those to packed batches."""
