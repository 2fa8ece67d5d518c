"""Gradio Spaces that show MPT models: plain HTTP clients of an OpenAI-style server, each folder copyable alone."""
