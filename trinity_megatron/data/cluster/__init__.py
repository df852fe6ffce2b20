"""Preparing data as tasks of a cluster, by datatrove's executors."""
