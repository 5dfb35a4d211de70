"""Ready-made ONNX folders as a source: found, checked, rewritten to the house contract, proved. No torch anywhere."""
