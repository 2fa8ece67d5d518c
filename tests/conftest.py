"""What every test shares."""

import torch

torch.set_num_threads(1)  # tiny models are faster on one thread, and machines that test are busy
