"""Running bundles: numpy, one inference backend, and a tokenizer. No torch, no onnx."""
