"""What a network costs, and which compression it needs."""
