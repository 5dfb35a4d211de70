"""Quantization: what a stored weight costs, and which weight gets which precision."""
