"""Claims about compression."""
