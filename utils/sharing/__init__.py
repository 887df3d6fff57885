"""Chapter 04, parameter sharing (survey section 5): one module per subsection or family; the parts are in `utils.parts`.

| module | survey | methods |
|---|---|---|
| `tables` | 5.2 | word tables at equal bytes; vocabulary trimming (C46) |
| `characters` | 5.1 | S-01 to S-04 |
| `words` | 5.2, embedding matrices | S-10 to S-14; 5.3: S-15 |
| `weights` | 5.2, weight matrices | S-05 to S-09 |
| `layers` | 5.3 | S-16 to S-18 |
"""
