"""Rounds: the files of a round, rounds/NN/{vectors,adapter,rejected}.safetensors, and a model of them."""
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import lora
import steer
from tools import ranks
from tools.files import read_tensors, save_tensors
from tools.folder import Folder


def save_vectors(path, vectors: dict[int, Tensor], **notes) -> None:
    """`layer.N` [d] float32, raw v; notes as metadata, the dose among them as the coeff."""
    save_tensors(path, {f"layer.{layer}": v for layer, v in vectors.items()}, **notes)


def read_vectors(path) -> tuple[dict[int, Tensor], float | None, dict[str, str]]:
    """Vectors, coeff (None if there is none) and notes of a file of a round or of `export --to vectors`."""
    tensors, notes = read_tensors(path)
    try:
        vectors = {int(key.removeprefix("layer.")): v for key, v in tensors.items()}
        coeff = float(notes.pop("coeff")) if "coeff" in notes else None
    except ValueError as error:
        raise ValueError(f"{path}: no file of steering vectors ({error})") from None
    return vectors, coeff, notes


def restack(model, files: Sequence[Path]) -> lora.Stack:
    """A stack on the modules that the files name, with their rounds, whatever ranks and blocks these have."""
    stack, layers = None, list(range(len(steer.blocks(model))))
    for path in files:
        tensors = read_tensors(path)[0]
        names = sorted({key.rsplit(".", 2)[0] for key in tensors})
        try:
            stack = stack or lora.attach(model, r=1, alpha=1, layers=layers, targets=names)
            stack.load_tensors(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return stack


def total_rank(files: Sequence[Path]) -> int:
    """The rank that the rounds of these files have together, for the Linear where it is largest."""
    total = Counter()
    for path in files:
        for key, tensor in read_tensors(path)[0].items():
            total[key.rsplit(".", 2)[0]] += len(tensor) if key.endswith(".A") else 0
    return max(total.values(), default=0)


class Rounds:
    """Writes whole files before their events, and reads them back for a run that goes on."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def path(self, rnd: int, name: str) -> Path:
        return self.folder.path / "rounds" / f"{rnd:02d}" / f"{name}.safetensors"

    @ranks.leads
    def save(self, rnd: int, name: str, tensors: dict, *, write=save_tensors, **notes) -> None:
        with self.folder.writing(path := self.path(rnd, name)):
            path.parent.mkdir(exist_ok=True)
            write(path, tensors, **notes)

    def save_vectors(self, rnd: int, vectors: dict[int, Tensor], **notes) -> None:
        self.save(rnd, "vectors", vectors, write=save_vectors, **notes)

    @ranks.leads
    def steering(self, rnd: int) -> dict:
        """{vectors, coeff} of a round whose dose is settled."""
        vectors, coeff, _ = read_vectors(self.path(rnd, "vectors"))
        return dict(vectors=vectors, coeff=coeff)

    @ranks.leads
    def adapter(self, rnd: int) -> dict[str, Tensor]:
        path = self.path(rnd, "adapter")                # renamed, if refused and then killed
        return read_tensors(path if path.exists() else self.path(rnd, "rejected"))[0]

    @ranks.leads
    def settle(self, rnd: int, accepted: bool) -> None:
        """The adapter's file gets the name that the gate gives it."""
        old, new = [self.path(rnd, name) for name in ("adapter", "rejected")][::-1 if accepted else 1]
        if old.exists():
            with self.folder.writing(new):
                os.replace(old, new)
