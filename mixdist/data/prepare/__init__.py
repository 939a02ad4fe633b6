"""Makes shards of a data set."""
