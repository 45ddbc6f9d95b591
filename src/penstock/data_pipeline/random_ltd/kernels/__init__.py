"""What moves tokens on each kind of device; ``random_ltd.ops`` chooses by where the tensors lie."""
