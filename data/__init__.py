"""Text to tokens to batches: tokenizing, checksummed shards, sample order, domain mixtures."""
