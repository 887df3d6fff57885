"""Chapter 06, sub-quadratic Transformers (survey section 7): one module per family; the parts are in `utils.parts`.

| module | survey | methods |
|---|---|---|
| `patterns` | 7.1, 7.2 | L-01 to L-03, L-12: blocks, strides, windows |
| `hashing` | 7.1 | L-04 |
| `sorting` | 7.2 | L-07 to L-09 |
| `linear` | 7.2 | L-05, L-06, L-10, L-11 |
| `adaptation` | | layer-wise distillation, long positions, scaling |
"""
