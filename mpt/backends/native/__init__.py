"""What runs in C on CPUs (`step.c`): a whole step of few tokens (`step.py`), and products of many (`library.py`)."""
