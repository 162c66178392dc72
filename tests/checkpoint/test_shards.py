import os

import pytest
from raw_safetensors import write, write_index

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.errors import CheckpointError

A, B = {"a": ("F32", (2, 3))}, {"b": ("BF16", (4,))}


def names(checkpoint):
    return list(checkpoint.tensors)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


class TestDirectories:
    def test_all_safetensors_and_nothing_else(self, tmp_path):
        write(tmp_path / "adapter_model.safetensors", A)
        write(tmp_path / "._adapter_model.safetensors", B)
        for other in ("config.json", "pytorch_model.bin", "model.gguf"):
            (tmp_path / other).write_text("x")
        checkpoint = open_checkpoint(tmp_path)
        assert names(checkpoint) == ["a"]
        assert checkpoint.warnings == checkpoint.unread == ()

    def test_files_of_different_names_are_read_as_one_checkpoint_with_a_warning(self, tmp_path):
        write(tmp_path / "one.safetensors", A)
        write(tmp_path / "two.safetensors", B)
        checkpoint = open_checkpoint(tmp_path)
        assert names(checkpoint) == ["a", "b"]
        (warning,) = checkpoint.warnings
        assert "one.safetensors, two.safetensors" in warning

    def test_the_model_index_comes_first(self, tmp_path):
        write(tmp_path / "x.safetensors", A)
        write(tmp_path / "y.safetensors", B)
        write_index(tmp_path / "model.safetensors.index.json", {"a": "x.safetensors"})
        write_index(tmp_path / "other.safetensors.index.json", {"b": "y.safetensors"})
        assert names(open_checkpoint(tmp_path)) == ["a"]
        assert names(open_checkpoint(tmp_path / "other.safetensors.index.json")) == ["b"]

    def test_the_only_index_of_another_name(self, tmp_path):
        write(tmp_path / "x.safetensors", A)
        write(tmp_path / "y.safetensors", B)
        index = "diffusion_pytorch_model.safetensors.index.json"
        write_index(tmp_path / index, {"b": "y.safetensors"})
        checkpoint = open_checkpoint(tmp_path)
        assert names(checkpoint) == ["b"]
        (warning,) = checkpoint.warnings
        assert index in warning
        assert "x.safetensors: not read" in warning
        assert checkpoint.unread == ("x.safetensors",)

    def test_several_indexes(self, tmp_path):
        for name in ("a", "b"):
            write_index(tmp_path / f"{name}.safetensors.index.json", {"a": "x.safetensors"})
        error = refusal(tmp_path)
        assert error.found == "a.safetensors.index.json, b.safetensors.index.json"
        assert "name one" in error.hint

    def test_an_index_named_in_the_working_folder(self, tmp_path, monkeypatch):
        write(tmp_path / "x.safetensors", A)
        write(tmp_path / "y.safetensors", B)
        write_index(tmp_path / "m.safetensors.index.json", {"a": "x.safetensors"})
        monkeypatch.chdir(tmp_path)
        checkpoint = open_checkpoint("m.safetensors.index.json")
        assert [shard.path for shard in checkpoint.shards] == ["x.safetensors"]
        assert "y.safetensors" in checkpoint.warnings[0]
        assert checkpoint.unread == (), "who names an index asks for no more"
        assert names(open_checkpoint(".")) == ["a"]

    def test_an_empty_folder(self, tmp_path):
        assert refusal(tmp_path).problem == "the folder is empty"

    def test_a_folder_without_checkpoint_lists_what_it_holds(self, tmp_path):
        for number in range(9):
            (tmp_path / f"{number}.txt").touch()
        error = refusal(tmp_path)
        assert error.problem == "the folder holds no safetensors"
        assert error.found == "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more"

    def test_a_pipeline_folder_suggests_its_parts(self, tmp_path):
        write(tmp_path / "unet" / "a.safetensors", A)
        write(tmp_path / "vae" / "a.safetensors", A)
        (tmp_path / "scheduler").mkdir()
        assert refusal(tmp_path).hint == "name one of its folders: unet, vae"

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt", "m.pth", "m.ckpt"]
    )
    def test_only_pickles(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR.")
        (tmp_path / "config.json").write_text("{}")
        if "-of-" in name:
            (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"\x80\x04.")
        error = refusal(tmp_path)
        assert error.problem == "not a safetensors file"
        assert (error.file, error.found) == (str(tmp_path / name), "a pickle")
        assert "weights_only=True" in error.hint
        assert "save_file" in error.hint
        assert not (tmp_path / "PWNED").exists()

    def test_only_pickles_that_are_no_weights(self, tmp_path):
        for name in ("optimizer.pt", "training_args.bin", "optim_world_size_2_rank_0.pt", "rng_state.pth"):
            (tmp_path / name).touch()
        error = refusal(tmp_path)
        assert error.problem == "the folder holds pickles and no safetensors"

    def test_only_gguf(self, tmp_path):
        (tmp_path / "model-Q4.GGUF").touch()
        error = refusal(tmp_path)
        assert error.problem == "the folder holds GGUF files and no safetensors"
        assert "not supported" in error.hint

    def test_an_index_of_pickles(self, tmp_path):
        write_index(tmp_path / "pytorch_model.bin.index.json", {"a": "pytorch_model.bin"})
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR.")
        for path in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
            error = refusal(path)
            assert (error.file, error.found) == (str(tmp_path / "pytorch_model.bin"), "a pickle")
            assert "save_file" in error.hint


class TestSubfolders:
    """Weights below the folder are not read, and not passed over in silence."""

    @staticmethod
    def unread(folder):
        checkpoint = open_checkpoint(folder)
        if not checkpoint.unread:
            assert checkpoint.warnings == ()
            return ()
        (warning,) = checkpoint.warnings
        assert warning.startswith(f"{folder} has weights in its subfolders that are not read: {checkpoint.unread[0]}")
        return checkpoint.unread

    def test_modules_of_a_pipeline(self, tmp_path):
        write(tmp_path / "model.safetensors", A)
        write(tmp_path / "2_Dense" / "model.safetensors", B)
        write(tmp_path / "3_Router" / "query_0" / "model.safetensors", B)
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").touch()
        assert self.unread(tmp_path) == ("2_Dense/model.safetensors", "3_Router/query_0/model.safetensors")
        write_index(tmp_path / "model.safetensors.index.json", {"a": "model.safetensors"})
        assert self.unread(tmp_path) == ("2_Dense/model.safetensors", "3_Router/query_0/model.safetensors")
        for named in ("model.safetensors", "model.safetensors.index.json"):
            checkpoint = open_checkpoint(tmp_path / named)
            assert checkpoint.unread == checkpoint.warnings == ()

    def test_an_index_may_name_them(self, tmp_path):
        write(tmp_path / "one" / "x.safetensors", A)
        write(tmp_path / "two" / "y.safetensors", B)
        write_index(tmp_path / "model.safetensors.index.json", {"a": "one/x.safetensors"})
        assert self.unread(tmp_path) == ("two/y.safetensors",)

    def test_steps_of_a_training_are_told_in_one_short_line(self, tmp_path):
        write(tmp_path / "model.safetensors", A)
        for step in range(100, 1800, 100):
            for number in (1, 2):
                write(tmp_path / f"checkpoint-{step}" / f"model-0000{number}-of-00002.safetensors", A)
            (tmp_path / f"checkpoint-{step}" / "optimizer.pt").touch()
        found = self.unread(tmp_path)
        assert found[:2] == ("checkpoint-100/*.safetensors", "checkpoint-200/*.safetensors")
        assert found[-1] == "checkpoint-1700/*.safetensors"
        (warning,) = open_checkpoint(tmp_path).warnings
        assert warning.endswith("checkpoint-500/*.safetensors and 12 more")

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (["pytorch_model.bin"], ("sub/pytorch_model.bin",)),
            (["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], 1),
            (["a.bin", "b.bin"], ("sub/*.bin",)),
            (["a.bin", "b.pt"], ("sub/*",)),
            (["optimizer.pt", "optimizer_0.bin", "scheduler.pt", "rng_state_0.pth", "rng_state.pth", "scaler.pt"], ()),
            (["training_args.bin", "random_states_0.pkl", "labels.pkl", "openvino_model_qint8_quantized.bin"], ()),
            (["model.gguf", "model.onnx", "vocab.txt"], ()),
            ([], ()),
        ],
    )
    def test_pickles(self, tmp_path, files, expected):
        write(tmp_path / "model.safetensors", A)
        (tmp_path / "sub").mkdir()
        for name in files:
            (tmp_path / "sub" / name).touch()
        assert self.unread(tmp_path) == (("sub/mp_rank_00_model_states.pt",) if expected == 1 else expected)

    def test_safetensors_come_before_pickles(self, tmp_path):
        write(tmp_path / "model.safetensors", A)
        write(tmp_path / "sub" / "model.safetensors", A)
        (tmp_path / "sub" / "pytorch_model.bin").touch()
        assert self.unread(tmp_path) == ("sub/model.safetensors",)

    def test_hidden_folders_and_links_to_folders_make_no_noise(self, tmp_path):
        folder = tmp_path / "model"
        write(folder / "model.safetensors", A)
        write(folder / ".cache" / "huggingface" / "x.safetensors", A)
        write(folder / "runs" / "._x.safetensors", A)
        write(tmp_path / "elsewhere" / "x.safetensors", A)
        (folder / "link").symlink_to(tmp_path / "elsewhere")
        (folder / "ring").symlink_to(folder)
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "x.safetensors.d").mkdir()
        (folder / "sub" / "y.safetensors").mkdir(parents=True)
        assert self.unread(folder) == ()
        (folder / "sub" / "x.safetensors").symlink_to(tmp_path / "elsewhere" / "x.safetensors")
        assert self.unread(folder) == ("sub/x.safetensors",), "files of a snapshot are links"
        (folder / "sub" / "x.safetensors").unlink()
        (folder / "sub" / "x.safetensors").symlink_to("x.safetensors")
        assert self.unread(folder) == ("sub/x.safetensors",)

    def test_a_folder_that_cannot_be_listed_may_hold_some(self, public_dir, error_of_nobody):
        write(public_dir / "model.safetensors", A)
        (public_dir / "private").mkdir(mode=0)

        def look():
            raise CheckpointError(str(open_checkpoint(public_dir).unread))

        text = error_of_nobody(look)
        (public_dir / "private").chmod(0o755)
        assert text == "CheckpointError: ('private/*',)"


class TestNumberedShards:
    @pytest.mark.parametrize(
        ("present", "total", "missing"),
        [
            ([2, 3], 3, "found:    2; missing: model-00001-of-00003.safetensors"),
            ([1], 3, "found:    1; missing: model-00002-of-00003.safetensors, model-00003-of-00003.safetensors"),
            ([2, 3], 2, "found:    1; missing: model-00001-of-00002.safetensors"),
            ([0, 2], 3, "found:    2; missing: model-00001-of-00003.safetensors"),
            ([1], 99999, "model-00006-of-99999.safetensors and 99993 more"),
        ],
    )
    def test_missing_ones_are_named(self, tmp_path, present, total, missing):
        for number in present:
            write(tmp_path / f"model-{number:05d}-of-{total:05d}.safetensors", {f"t{number}": ("U8", (1,))})
        assert missing in str(refusal(tmp_path))

    @pytest.mark.parametrize("numbers", [[1, 2, 3], [0, 1, 2]])
    def test_complete_ones_are_read(self, tmp_path, numbers):
        for number in numbers:
            write(tmp_path / f"m-{number:05d}-of-00003.safetensors", {f"t{number}": ("U8", (1,))})
        assert names(open_checkpoint(tmp_path)) == [f"t{number}" for number in numbers]


class TestCache:
    """The layout of the Hugging Face cache: snapshots of links to blobs."""

    @staticmethod
    def snapshot(repo, commit, tensors):
        blob = repo / "blobs" / f"blob-of-{commit}"
        write(blob, tensors)
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(os.path.relpath(blob, folder))
        (folder / "config.json").write_text("{}")
        return folder

    @pytest.fixture
    def repo(self, tmp_path):
        return tmp_path / "models--org--name"

    def test_a_snapshot(self, repo):
        folder = self.snapshot(repo, "abc", A)
        checkpoint = open_checkpoint(folder)
        assert names(checkpoint) == ["a"]
        assert checkpoint.shards[0].inode == (repo / "blobs" / "blob-of-abc").stat().st_ino
        assert checkpoint.shards[0].path == str(folder / "model.safetensors")

    def test_a_snapshot_with_an_index(self, repo):
        folder = self.snapshot(repo, "abc", A)
        write_index(repo / "blobs" / "index", {"a": "model.safetensors"})
        (folder / "model.safetensors.index.json").symlink_to("../../blobs/index")
        assert names(open_checkpoint(folder)) == ["a"]
        assert names(open_checkpoint(folder / "model.safetensors.index.json")) == ["a"]

    def test_equal_blobs_of_two_snapshots_have_equal_regions(self, repo):
        first = self.snapshot(repo, "abc", A)
        second = repo / "snapshots" / "def"
        second.mkdir()
        (second / "model.safetensors").symlink_to("../../blobs/blob-of-abc")
        one, other = open_checkpoint(first), open_checkpoint(second)
        assert one.tensors["a"].region == other.tensors["a"].region

    def test_a_cache_folder_with_one_snapshot(self, repo):
        self.snapshot(repo, "abc", A)
        assert names(open_checkpoint(repo)) == ["a"]

    def test_a_cache_folder_with_several_snapshots_follows_main(self, repo):
        self.snapshot(repo, "abc", A)
        self.snapshot(repo, "def", B)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("def\n")
        assert names(open_checkpoint(repo)) == ["b"]

    @pytest.mark.parametrize("main", [None, "gone", "..", "\xff"])
    def test_a_cache_folder_with_several_snapshots_and_no_main_lists_them(self, repo, main):
        self.snapshot(repo, "abc", A)
        self.snapshot(repo, "def", B)
        if main is not None:
            (repo / "refs").mkdir()
            (repo / "refs" / "main").write_text(main, encoding="latin-1")
        assert refusal(repo).found == "abc, def"

    def test_a_cache_folder_without_snapshots(self, repo):
        (repo / "snapshots").mkdir(parents=True)
        assert refusal(repo).problem == "the cache folder holds no snapshot"

    def test_a_blob_that_was_not_downloaded(self, repo):
        folder = self.snapshot(repo, "abc", A)
        (repo / "blobs" / "blob-of-abc").unlink()
        error = refusal(folder)
        assert error.problem == "a symbolic link leads nowhere"
        assert error.file == str(folder / "model.safetensors")
        assert "download" in error.hint


class TestPaths:
    def test_missing(self, tmp_path):
        error = refusal(tmp_path / "none")
        assert error.problem == "no such file or directory"
        assert error.hint is None

    def test_a_hub_name_says_what_it_needs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "ckptdiff[hub]" in refusal("org/model-1.5B").hint

    def test_a_file_as_a_folder(self, tmp_path):
        write(tmp_path / "a", A)
        assert refusal(tmp_path / "a" / "b").problem == "cannot be read"

    def test_a_fifo(self, tmp_path):
        os.mkfifo(tmp_path / "f")
        os.mkfifo(tmp_path / "f.safetensors.index.json")
        assert refusal(tmp_path / "f").problem == "not a regular file"
        assert refusal(tmp_path / "f.safetensors.index.json").problem == "not a regular file"

    def test_folders_without_permission(self, public_dir, error_of_nobody):
        folder = public_dir / "model"
        path = write(folder / "a.safetensors", A)
        assert error_of_nobody(lambda: open_checkpoint(folder)) == ""
        folder.chmod(0o711)
        assert "the folder cannot be listed" in error_of_nobody(lambda: open_checkpoint(folder))
        assert error_of_nobody(lambda: open_checkpoint(path)) == ""
        folder.chmod(0o644)
        text = error_of_nobody(lambda: open_checkpoint(folder))
        assert text.startswith("CheckpointError: no permission to read")
        assert path in text

    def test_a_folder_that_may_be_listed_and_not_entered(self, public_dir, error_of_nobody):
        write(public_dir / "pipeline" / "unet" / "a.safetensors", A)
        (public_dir / "pipeline").chmod(0o644)
        text = error_of_nobody(lambda: open_checkpoint(public_dir / "pipeline"))
        assert text.startswith("CheckpointError: the folder holds no safetensors")

    def test_a_cache_folder_without_permission(self, public_dir, error_of_nobody):
        repo = public_dir / "models--org--name"
        TestCache.snapshot(repo, "abc", A)
        assert error_of_nobody(lambda: open_checkpoint(repo)) == ""
        (repo / "snapshots").chmod(0o644)
        assert "no permission to read" in error_of_nobody(lambda: open_checkpoint(repo))
