"""How shards come to be: which sample goes into which shard, how one is written, segmented or indexed."""
