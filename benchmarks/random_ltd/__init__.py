"""Random layerwise token dropping: its operations on CPU and GPU, and a model's step."""
