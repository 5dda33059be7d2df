"""GGUF: a control vector of llama.cpp as a file of version 3, written and read without a package."""
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

from tools.files import write_whole


def dosed(vectors: dict[int, Tensor], coeff: float) -> dict[int, Tensor]:
    """coeff * v of every block [d] float32: what `steered` adds."""
    return {layer: (coeff * v.float()).cpu() for layer, v in vectors.items()}


def save_gguf(path, vectors: dict[int, Tensor], coeff: float, model_type: str, notes: dict[str, str]) -> None:
    """A llama.cpp control vector: coeff is baked in, so scale 1.0 is the dose; `direction.N` is for block N.

    That is GGUF version 3: strings and one uint32 as key-values, then float32 tensors aligned to 32 bytes.
    llama.cpp adds direction.N to the output of block N at every position, like `steered`; the file has no
    field that says so, so the notes do. ValueError for block 0, which llama.cpp does not steer.
    """
    if 0 in vectors:
        raise ValueError("llama.cpp cannot steer block 0, which these vectors do: take a later --steer-band")
    directions = dosed(vectors, coeff)
    if not all(v.isfinite().all() and v.any() for v in directions.values()):
        raise ValueError(f"a vector is zero or not finite at dose {coeff}: it would do nothing, or harm")

    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()
    fields = {"general.architecture": "controlvector", "controlvector.model_hint": model_type,
              "controlvector.layer_count": len(directions),
              **{f"steering.{key}": value for key, value in notes.items() if value},
              "steering.coeff": repr(coeff)}
    head, body = b"GGUF" + struct.pack("<IQQ", 3, len(directions), len(fields)), b""
    for key, value in fields.items():
        is_number = isinstance(value, int)
        head += string(key) + struct.pack("<I", 4 if is_number else 8)
        head += struct.pack("<I", value) if is_number else string(value)
    for layer, v in directions.items():                         # one dimension, float32
        head += string(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(v), 0, len(body))
        body += v.numpy().astype("<f4").tobytes() + b"\0" * (-4 * len(v) % 32)
    write_whole(path, head + b"\0" * (-len(head) % 32) + body)


def read_gguf(path) -> tuple[dict[int, Tensor], dict]:
    """Directions {block: [d]} and key-values of a control vector: as `save_gguf` writes, not all of GGUF."""
    content, at = Path(path).read_bytes(), 24
    if content[:8] != b"GGUF\3\0\0\0":
        raise ValueError(f"{path}: not a GGUF file of version 3")

    def take(form):
        nonlocal at
        value, = struct.unpack_from("<" + form, content, at)
        at += struct.calcsize("<" + form)
        return value

    def string():
        return take(f"{take('Q')}s").decode()
    n_tensors, n_fields = struct.unpack_from("<QQ", content, 8)
    fields, places = {}, {}
    for _ in range(n_fields):
        key, kind = string(), take("I")
        if kind not in (4, 8):
            raise ValueError(f"{path}: {key} is of type {kind}; expected a string (8) or uint32 (4)")
        fields[key] = take("I") if kind == 4 else string()
    for _ in range(n_tensors):
        name, n_dims, size, kind, offset = string(), take("I"), take("Q"), take("I"), take("Q")
        if n_dims != 1 or kind != 0 or not re.fullmatch(r"direction\.\d+", name):
            raise ValueError(f"{path}: {name} has {n_dims} dimensions and type {kind}; expected "
                             "direction.N, 1 and float32 (0)")
        places[int(name.removeprefix("direction."))] = offset, size
    body = bytearray(content[at + -at % 32:])
    found = {layer: torch.frombuffer(body, dtype=torch.float32, count=size, offset=offset).clone()      # [d]
             for layer, (offset, size) in places.items()}
    return found, fields
