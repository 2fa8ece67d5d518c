"""Ports checkpoints: any surviving copy of an MPT in, Hugging Face, ONNX, FasterTransformer and GGUF out, verified."""
