"""Changes to a dense model that leave its function as it is and make it easier to quantize: one file a method."""
