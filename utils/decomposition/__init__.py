"""Chapter 05, tensor decomposition (survey section 6): one module per subsection or family; the parts are in `utils.parts`.

| module | survey | methods |
|---|---|---|
| `factors` | 6.1, matrices | T-01, T-02; data-aware and Fisher-weighted factors (C32) |
| `gates` | 6.1 | T-05 |
| `codes` | 6.1, 6.2, embedding matrices | T-03, T-04, T-06, T-07 |
| `tensors` | 6.3 | T-08 to T-10, T-12 |
| `trilinear` | 6.3 | T-11 |
"""
