"""Pretraining data: documents become shards of tokens, shards become one endless, resumable order of samples."""
