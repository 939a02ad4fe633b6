"""Data in webdataset's tar shards, with an index of where everything lies."""
