"""Which way of reading is chosen for which mount, on made-up tables of mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptdiff.stream import file_systems
from ckptdiff.stream.file_systems import choose_io

MOUNTS = b"""\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /proc rw,nosuid - proc proc rw
41 22 0:40 / /net rw,relatime shared:2 master:3 - nfs4 server:/export rw,vers=4.2
42 41 0:41 / /net/local rw - xfs /dev/sdb rw
43 22 0:42 / /home/me/cloud\\040drive rw - fuse.rclone remote: rw
44 22 0:43 / /odd\\134name rw - lustre lustre rw
45 22 0:44 / /caf\xe9\xa0x rw - cifs //server/share rw
46 22 0:45 / /twice rw - nfs old rw
47 22 0:46 / /twice rw - tmpfs new rw
48 22 0:47 / /vt\x0b\x1c\xc2\x85 rw - 9p shared rw
49 22 0:48 / /netmask rw - btrfs /dev/sdc rw
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTS)
    monkeypatch.setattr(file_systems, "_MOUNTS", tmp_path / "mountinfo")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(
    ("path", "io"),
    [
        ("/models/a.safetensors", "mmap"),
        ("/net/models/a.safetensors", "pread"),
        ("/net", "pread"),
        ("/network/a.safetensors", "mmap"),
        ("/netmask/a.safetensors", "mmap"),
        ("/net/local/a.safetensors", "mmap"),
        ("/net/locality/a.safetensors", "pread"),
        ("/home/me/cloud drive/a.safetensors", "pread"),
        ("/home/me/a.safetensors", "mmap"),
        ("/odd\\name/a.safetensors", "pread"),
        (os.fsdecode(b"/caf\xe9\xa0x/a.safetensors"), "pread"),
        ("/twice/a.safetensors", "mmap"),
        ("/vt\x0b\x1c\x85/a.safetensors", "pread"),
    ],
)
def test_network_file_systems_are_read_with_pread(path: str, io: str) -> None:
    assert choose_io("auto", [path]) == io


@pytest.mark.usefixtures("mounts")
def test_one_file_on_a_network_is_enough() -> None:
    assert choose_io("auto", ["/a", "/b", "/net/c"]) == "pread"
    assert choose_io("auto", []) == "mmap"


@pytest.mark.usefixtures("mounts")
def test_what_was_asked_for_is_taken() -> None:
    assert choose_io("mmap", ["/net/a"]) == "mmap"
    assert choose_io("pread", ["/a"]) == "pread"


@pytest.mark.usefixtures("mounts")
def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/net/models")
    assert choose_io("auto", [str(tmp_path / "link/a.safetensors")]) == "pread"


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_systems, "_MOUNTS", tmp_path / "missing")
    assert choose_io("auto", ["/net/a"]) == "mmap"


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs Linux")
def test_the_table_of_this_machine_can_be_read() -> None:
    assert choose_io("auto", ["/proc/version"]) == "mmap"
