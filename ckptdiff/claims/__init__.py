"""Judge the claims of arXiv 2606.13657 about an update, for one pair of checkpoints."""

from ckptdiff.claims.judge import Verdict, judge_claims
from ckptdiff.claims.published import PUBLISHED, figures_of

__all__ = ["PUBLISHED", "Verdict", "figures_of", "judge_claims"]
