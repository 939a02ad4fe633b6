"""What a mixture is worth on held-out rows."""
