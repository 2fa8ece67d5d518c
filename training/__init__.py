"""Makes checkpoints: data, pretraining, finetuning, evaluation."""
