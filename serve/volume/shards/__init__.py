"""One volume by shards of its outputs, computed by any number of processes that share a disk and nothing else."""
