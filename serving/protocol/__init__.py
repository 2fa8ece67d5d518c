"""What a request may say: bodies of OpenAI's API, read strictly, and what the engine is asked for by them.

`body.py` reads a body, `unused.py` lists fields that have no use here, `generation.py` has the bodies of completions
and chat, with `messages.py` and `structure.py` for their larger parts, `sampling.py` makes the engine's request of
them. Other APIs' bodies become a chat's in `serving/dialects/`.
"""
