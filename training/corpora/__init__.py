"""What the mpt-tiny family reads: generated documents, each a pure function of a seed, and public-domain novels."""
