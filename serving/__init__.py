"""Answers with checkpoints: the engine, the OpenAI protocol, the HTTP app."""
