"""YAML of any shape with its JSON, for the tiny instruct model: `documents.py` is where to begin."""
