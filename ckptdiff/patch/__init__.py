"""Exact weight deltas: make one of two checkpoints, apply a chain of them, verify, join, and tell what is in one."""

from ckptdiff.patch.applying import AppliedDelta, apply, verify
from ckptdiff.patch.changes import Change
from ckptdiff.patch.changes import open_patch as open
from ckptdiff.patch.comparing import Shipped
from ckptdiff.patch.contents import PatchContents, contents_of
from ckptdiff.patch.delta import Delta, TensorDelta
from ckptdiff.patch.in_place import apply_in_place
from ckptdiff.patch.live_model import apply_to
from ckptdiff.patch.make import MadeDelta, make
from ckptdiff.patch.make_directory import make_directory
from ckptdiff.patch.make_flat import make_flat
from ckptdiff.patch.shipped_contents import ShippedContents, contents_of_flat, contents_of_folder
from ckptdiff.patch.squash import squash

__all__ = [
    "AppliedDelta",
    "Change",
    "Delta",
    "MadeDelta",
    "PatchContents",
    "Shipped",
    "ShippedContents",
    "TensorDelta",
    "apply",
    "apply_in_place",
    "apply_to",
    "contents_of",
    "contents_of_flat",
    "contents_of_folder",
    "make",
    "make_directory",
    "make_flat",
    "open",
    "squash",
    "verify",
]
