"""Writing, proving and reading a quantized checkpoint: the parts of `quantize`."""
