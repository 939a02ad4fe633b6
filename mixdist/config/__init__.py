"""What a user says: keys and options to a config, a config to objects."""
