"""Many requests at once on one model: the loop, its queue, its memory, its draws. Knows nothing of HTTP."""
