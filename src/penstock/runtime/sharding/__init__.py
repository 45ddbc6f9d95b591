"""Parameters, gradients and optimizer state of a stage divided over its replicas, by torch's FSDP2."""
