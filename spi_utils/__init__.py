"""Which layers of a language model to keep in 16-bit, decided from the weights, and what that is worth.

The modules follow the data: models -> spectra, formats -> sensitivity -> analyze -> plan -> figures,
quantize -> evaluate -> publish. Nothing heavy is imported here, so that `spi_utils.plan` and
`spi_utils.formats` work without torch.
"""

__version__ = "0.1.0"
