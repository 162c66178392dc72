"""Reports of a :class:`~ckptdiff.figures.result.Diff` in every format, and the progress display."""
