"""Rounds: the files of a round in a run folder, rounds/NN/{vectors,adapter,rejected}.safetensors."""
import os
from pathlib import Path

from torch import Tensor

from tools import ranks
from tools.folder import Folder, read_tensors, save_tensors


def read_vectors(path) -> tuple[dict[int, Tensor], float | None, dict[str, str]]:
    """Vectors, coeff (None if there is none) and notes of a file of a round or of `export --to vectors`."""
    tensors, notes = read_tensors(path)
    try:
        vectors = {int(key.removeprefix("layer.")): v for key, v in tensors.items()}
        coeff = float(notes.pop("coeff")) if "coeff" in notes else None
    except ValueError as error:
        raise ValueError(f"{path}: no file of steering vectors ({error})") from None
    return vectors, coeff, notes


class Rounds:
    """Writes whole files before their events, and reads them back for a run that goes on."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def path(self, rnd: int, name: str) -> Path:
        return self.folder.path / "rounds" / f"{rnd:02d}" / f"{name}.safetensors"

    @ranks.leads
    def save(self, rnd: int, name: str, tensors: dict, **notes) -> None:
        with self.folder.writing(self.path(rnd, name)):
            self.path(rnd, name).parent.mkdir(exist_ok=True)
            save_tensors(self.path(rnd, name), tensors, notes)

    def save_vectors(self, rnd: int, vectors: dict[int, Tensor], **notes) -> None:
        self.save(rnd, "vectors", {f"layer.{layer}": v for layer, v in vectors.items()}, **notes)

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
