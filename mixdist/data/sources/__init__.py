"""What the config key data can name."""
