"""Chapter 03, knowledge distillation (survey section 4). `objective` and `outputs` are shared by all.

| module | survey | methods |
|---|---|---|
| `losses` | 4.1, one teacher | K-01 to K-04, K-07 to K-11 |
| `precision` | 4.1, students in few bits | K-05, K-06 |
| `peers` | 4.2, collaborative | K-12, K-13 |
| `teachers` | 4.3, several teachers (and 4.4, K-23) | K-14 to K-18, K-23 |
| `layers` | 4.4, layers of Transformers | K-20, K-22, K-24, K-26 |
"""
