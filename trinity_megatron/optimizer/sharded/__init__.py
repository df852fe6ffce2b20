"""Muon over the shards of the distributed optimizer."""
