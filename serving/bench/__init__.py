"""`mpt bench`: a client that loads an OpenAI-style server, ours or another, and tells how fast it answers."""
