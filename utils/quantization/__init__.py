"""Chapter 02, quantization (survey section 3): one module per subsection, and `quantizer`, which they share."""
