"""From a data set as it comes to shards."""
