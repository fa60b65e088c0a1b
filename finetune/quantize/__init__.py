"""`finetune quantize`: a dense checkpoint becomes a quantized one, calibrated, measured and published whole."""
