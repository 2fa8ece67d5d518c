"""One module per format: how to recognise it, read it, and write it."""
