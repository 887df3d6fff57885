"""Chapter 01, pruning (survey section 2): one module per subsection, and `masks`, which they share."""
