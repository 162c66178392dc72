"""Follow the growth of an update over the checkpoints of a training run."""

from ckptdiff.track.file import load_track, save_track
from ckptdiff.track.follow import track
from ckptdiff.track.result import Track

__all__ = ["Track", "load_track", "save_track", "track"]
