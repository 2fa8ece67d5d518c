"""What every test shares."""

import os

import torch

torch.set_num_threads(1)  # tiny models are faster on one thread, and machines that test are busy
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our kernels then run on CPU; Triton reads it when they are made
