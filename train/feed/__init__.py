"""From a shard set to the batches of a training loop: which sample when, read ahead into reused memory."""
