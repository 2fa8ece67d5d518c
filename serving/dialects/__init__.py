"""Other APIs over the same path: each body becomes a chat or a completion, each answer of that the API's own.

`responses.py` is OpenAI's Responses API, `anthropic.py` Anthropic's Messages, `ollama.py` Ollama's chat and generate.
They know OpenAI's requests and responses and nothing of engines. How each writes events and errors is in `wire.py`.
"""
