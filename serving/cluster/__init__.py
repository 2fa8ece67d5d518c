"""The same HTTP API over many replicas on Ray Serve."""
