"""What makes a tensor another one of its own side: bytes, values, or the word of config.json; never its name."""

import json

import pytest

from ckptdiff.checkpoint import Checkpoint, Shard, TensorInfo
from ckptdiff.checkpoint.dtypes import DTYPES
from ckptdiff.checkpoint.ties import Tie, find_ties

SHARD = Shard("a", 1000, 0, 1, 1, "", {})
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tensor(name, start, stop, shape=(2, 4), dtype="BF16"):
    return TensorInfo(name, dtype, shape, SHARD, start, stop)


def checkpoint(*names, folder="nowhere", **dtypes):
    """A checkpoint of [2, 4] matrices one after the other, in a file that need not exist."""
    shard = Shard(f"{folder}/model.safetensors", 1000, 0, 1, 1, "", {})
    tensors, end = {}, 0
    for name in names:
        dtype = dtypes.get(name.split(".")[-2], "BF16")
        start, end = end, end + DTYPES[dtype].bits
        tensors[name] = TensorInfo(name, dtype, (2, 4), shard, start, end)
    return Checkpoint(folder, (shard,), tensors, ())


class Equal:
    """Says which tensors are equal, and notes what it was asked."""

    def __init__(self, *groups):
        self.groups = [set(group) for group in groups]
        self.asked = []

    def __call__(self, first, second):
        self.asked.append((first.name, second.name))
        return any({first.name, second.name} <= group for group in self.groups)


def ties(side, matched, equal, alone=None):
    alone = [name for name in side.tensors if name not in matched] if alone is None else alone
    return find_ties(side, matched, alone, "tuned", equal)


def configured(folder, config):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


class TestValues:
    def test_an_equal_head_is_tied(self):
        found = ties(checkpoint(EMBEDDING, HEAD), [EMBEDDING], Equal({EMBEDDING, HEAD}))
        assert found.found == {HEAD: Tie(EMBEDDING, "values")}
        assert found.warnings == ()

    def test_another_head_is_not(self):
        equal = Equal()
        assert ties(checkpoint(EMBEDDING, HEAD), [EMBEDDING], equal) == ties(checkpoint(HEAD), [], equal)
        assert equal.asked == [(HEAD, EMBEDDING)]

    @pytest.mark.parametrize("config", [True, False])
    def test_values_win_over_the_configuration(self, tmp_path, config):
        side = checkpoint(EMBEDDING, HEAD, folder=configured(tmp_path, {"tie_word_embeddings": config}))
        assert ties(side, [EMBEDDING], Equal({EMBEDDING, HEAD})).found == {HEAD: Tie(EMBEDDING, "values")}
        other = ties(side, [EMBEDDING], Equal())
        assert other.found == {}
        assert bool(other.warnings) == config
        assert all("differs from model.embed_tokens.weight" in warning for warning in other.warnings)

    def test_any_of_several_embeddings_will_do_and_compared_ones_come_first(self):
        names = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight"]
        side = checkpoint(*names, HEAD)
        equal = Equal({"encoder.embed_tokens.weight", HEAD})
        assert ties(side, names, equal).found == {HEAD: Tie("encoder.embed_tokens.weight", "values")}
        equal = Equal({*names, HEAD})
        found = ties(side, ["shared.weight"], equal).found
        assert found == {name: Tie("shared.weight", "values") for name in (*names[:2], HEAD)}
        assert {other for _, other in equal.asked} == {"shared.weight"}

    def test_ties_make_no_ring(self):
        """Two embeddings that are equal, and that the other side lacks: one of them is only here."""
        names = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"]
        found = ties(checkpoint(*names, HEAD, "w.weight"), ["w.weight"], Equal({*names, HEAD})).found
        assert found == {name: Tie(names[1], "values") for name in (names[0], HEAD)}

    def test_dtypes_may_differ(self):
        side = checkpoint(EMBEDDING, HEAD, lm_head="F32")
        assert HEAD in ties(side, [EMBEDDING], Equal({EMBEDDING, HEAD})).found

    @pytest.mark.parametrize(
        ("embedding", "head"),
        [
            ("transformer.wte.weight", "lm_head.weight"),
            ("gpt_neox.embed_in.weight", "embed_out.weight"),
            ("transformer.word_embeddings.weight", "lm_head.weight"),
            ("tok_embeddings.weight", "output.weight"),
            ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
            ("backbone.embeddings.weight", "lm_head.weight"),
            ("shared.weight", "decoder.embed_tokens.weight"),
        ],
    )
    def test_families(self, embedding, head):
        side = checkpoint(embedding, head)
        assert ties(side, [embedding], Equal({embedding, head})).found == {head: Tie(embedding, "values")}
        assert ties(side, [embedding], Equal()).found == {}

    @pytest.mark.parametrize(
        ("embedding", "head", "dtypes"),
        [
            (EMBEDDING, HEAD, {"lm_head": "I8"}),
            (EMBEDDING, "lm_head.bias", {}),
            (EMBEDDING, "score.weight", {}),
            ("wpe.weight", HEAD, {}),
            ("model.visual.embed_tokens.weight", HEAD, {}),
            (EMBEDDING, "model.visual.lm_head.weight", {}),
            ("other.weight", HEAD, {}),
        ],
    )
    def test_what_no_model_ties_is_not_even_read(self, embedding, head, dtypes):
        equal = Equal({embedding, head})
        assert ties(checkpoint(embedding, head, **dtypes), [embedding], equal).found == {}
        assert equal.asked == []


class TestConfiguration:
    """Asked only where values cannot be looked at."""

    SCALED = ("model.embed_tokens.weight_scale", EMBEDDING, HEAD)

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"tie_word_embeddings": True}, True),
            ({"text_config": {"tie_word_embeddings": True}, "sizes": [float("inf")]}, True),
            ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
            ({"tie_word_embeddings": False}, False),
            ({"tie_word_embeddings": "true", "text_config": [True]}, False),
            ({"vision_config": {"tie_word_embeddings": True}}, False),
            ({}, False),
        ],
    )
    def test_where_nothing_is_read(self, tmp_path, config, said):
        side = checkpoint(EMBEDDING, HEAD, folder=configured(tmp_path, config))
        found = ties(side, [EMBEDDING], None)
        assert found.found == ({HEAD: Tie(EMBEDDING, "config")} if said else {})
        (warning,) = found.warnings
        assert ("by its config.json, not by its values" in warning) == said
        assert ("data has to be read" in warning) != said

    @pytest.mark.parametrize("said", [True, False])
    def test_codes_with_scales_beside_them_are_no_values(self, tmp_path, said):
        folder = configured(tmp_path, {"tie_word_embeddings": said})
        side = checkpoint(*self.SCALED, folder=folder, embed_tokens="F8_E4M3")
        equal = Equal({EMBEDDING, HEAD})
        found = ties(side, [EMBEDDING], equal, alone=[HEAD])
        assert found.found == ({HEAD: Tie(EMBEDDING, "config")} if said else {})
        assert equal.asked == []

    def test_no_file(self, tmp_path):
        assert ties(checkpoint(EMBEDDING, HEAD, folder=str(tmp_path)), [EMBEDDING], Equal()).warnings == ()

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("", "not valid JSON"),
            ("\udcff", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("[true]", "not a JSON object"),
            (None, "not a regular file"),
            (" " * 10_000_001, "too long"),
        ],
        ids=["empty", "bytes", "deep", "list", "folder", "long"],
    )
    def test_a_file_that_cannot_be_used_is_said(self, tmp_path, content, problem):
        path = tmp_path / "config.json"
        if content is None:
            path.mkdir()
        else:
            path.write_text(content, errors="surrogateescape")
        found = ties(checkpoint(EMBEDDING, HEAD, folder=str(tmp_path)), [EMBEDDING], Equal())
        (warning,) = found.warnings
        assert str(path) in warning and problem in warning and "not used" in warning
        assert found.found == {}
