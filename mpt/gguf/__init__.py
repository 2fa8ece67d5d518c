"""GGUF, llama.cpp's file of a whole checkpoint: its header, config, tokenizer and weights."""
