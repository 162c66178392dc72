"""Read what is on disk: shards and their headers, the place of each name in its model, and pairs of tensors."""

from ckptdiff.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_pair
from ckptdiff.checkpoint.dtypes import DTYPES, DType, Kind
from ckptdiff.checkpoint.header import Shard, TensorInfo, read_header
from ckptdiff.checkpoint.names import Place, locate
from ckptdiff.checkpoint.pairing import Alias, Mismatch, Pairing, TensorPair, pair
from ckptdiff.checkpoint.places import locate_all

__all__ = [
    "DTYPES",
    "Alias",
    "Checkpoint",
    "DType",
    "Kind",
    "Mismatch",
    "Pairing",
    "Place",
    "Shard",
    "TensorInfo",
    "TensorPair",
    "locate",
    "locate_all",
    "open_checkpoint",
    "open_pair",
    "pair",
    "read_header",
]
