"""Pipeline claims, one script each."""
