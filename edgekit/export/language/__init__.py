"""Language-model export without torch: config.json and safetensors to ONNX."""
