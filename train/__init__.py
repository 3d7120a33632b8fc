"""The workshop where the teacher is not: a student learns from what a shard set says. Never imports diffusers."""
