"""The claims of arXiv 2606.13657 about an update, judged for one pair of checkpoints."""
