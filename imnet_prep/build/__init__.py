"""Convert sources to a records folder: a plan, its shards, and the commit that publishes them."""
