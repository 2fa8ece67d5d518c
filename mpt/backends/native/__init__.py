"""What runs in C on CPUs: a model's step for few tokens and for whole prompts (`step.py`), and draws (`draw.py`).

`available.py` says whether a model runs here, `library.py` compiles and loads the code, `structures.py` is what C and
Python share. Everything else is in C, and each file says on top what it holds: `common.h` first.
"""
