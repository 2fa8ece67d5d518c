"""OpenAI's batches: a file of requests, each answered when there is time, by `mpt run-batch` and by `/v1/batches`."""
