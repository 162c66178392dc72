"""Write what a run found for other programs: masks, sparse patches and SHiRA adapters; and apply a patch."""

from ckptdiff.exports.apply import Applied, apply_patch
from ckptdiff.exports.patch import export_patch, missing_from_patch
from ckptdiff.exports.shira import LeftOut, ShiraExport, export_shira
from ckptdiff.runfile.export import Layout, export_masks

__all__ = [
    "Applied",
    "Layout",
    "LeftOut",
    "ShiraExport",
    "apply_patch",
    "export_masks",
    "export_patch",
    "export_shira",
    "missing_from_patch",
]
