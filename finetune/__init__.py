"""Parameter-efficient fine-tuning of language models on a frozen, quantized base."""
