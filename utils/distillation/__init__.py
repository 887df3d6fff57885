"""Chapter 03, knowledge distillation (survey section 4): one module per subsection or family; `objective` and `outputs` serve all.

| module | survey | methods |
|---|---|---|
| `losses` | 4.1, one teacher | K-01 to K-04, K-07 to K-11 |
| `precision` | 4.1, students in few bits | K-05, K-06 |
| `peers` | 4.2, collaborative | K-12, K-13 |
| `teachers` | 4.3, several teachers (and 4.4, K-23) | K-14 to K-18, K-23 |
| `layers` | 4.4, layers of Transformers | K-20, K-22, K-24, K-26 |
| `students` | 4.4, other architectures, and where a student starts | K-30 |
| `language` | 4.4, masked language modelling | K-21, K-25 |
| `vocabulary` | 4.4, a vocabulary of the student's own | K-19 |
| `texts` | 4.4, texts without labels | K-27 |
| `extreme` | 4.4, in stages, unfrozen from the top | K-28 |
| `mobile` | 4.4, bottleneck layers | K-29 |
| `theseus` | 4.4, replaced piece by piece | K-31 |
"""
