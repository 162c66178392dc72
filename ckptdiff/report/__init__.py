"""Reports of a :class:`~ckptdiff.result.Diff`: the table, json, ndjson, csv and parquet, and the progress display."""
