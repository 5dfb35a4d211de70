"""Language models: prefill, decode, sampling, streaming."""
