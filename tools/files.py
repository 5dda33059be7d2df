"""Files: text that is inert to its reader, and files that are whole or not there at all.

Everything that a model or a user wrote passes `inert` on its way to a terminal, HTML or Markdown.
"""
import dataclasses
import html
import math
import os
import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

# control characters, marks that reorder or hide text, tags, lone surrogates; joiners stay: scripts need them
UNSEEN = ("[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
          "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]")


# ---- text ------------------------------------------------------------------------------------------------


def inert(text, to: str = "terminal", limit: int | None = None) -> str:
    """Any text for a reader; to = terminal, html (content or attribute) or markdown.

    Nothing in it is markup, moves the cursor or turns a line. What is over `limit` characters is cut off.
    """
    text = str(text)
    if to == "html":
        text = re.sub(r"\n{4,}", lambda match: f" ↵×{len(match.group())} ", text)
    rest = f"… ({len(text) - limit:,} more characters)" if limit is not None and len(text) > limit else ""
    text = text[:limit]
    if to == "terminal":
        return re.sub(UNSEEN + "+", " ", text) + rest
    if to == "html":                                    # what is unseen is shown
        def show(match):
            code = ord(match.group())
            known = {9: " ", 10: " ↵ "} | {n: chr(0x2400 + n) for n in (*range(9), *range(11, 32))}
            return known.get(code, f"⟨U+{code:04X}⟩")
        return html.escape(re.sub(UNSEEN, show, text), quote=True) + rest
    if to != "markdown":
        raise ValueError(f"to={to!r}: expected terminal, html or markdown")
    text = " ".join(re.sub(UNSEEN, " ", text).split())  # one line
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~:@-])", r"\\\1", text)
    return re.sub(r"(?i)\bwww\.", r"www\\.", text) + rest


def one_line(error) -> str:
    """An error as one sentence for the terminal, whatever it quotes."""
    return inert(" ".join(str(error).split()))[:1000] or type(error).__name__


def plain(x):
    """Tensors as lists, non-finite numbers as null: what JSON can hold."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if dataclasses.is_dataclass(x):
        return plain(dataclasses.asdict(x))
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ---- files -----------------------------------------------------------------------------------------------


def write_whole(path, content: bytes) -> None:
    """Write a temporary file beside `path`, rename it: a reader sees the old file or the new, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):                  # the new name survives a power cut too
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)               # still there only if something went wrong


def save_tensors(path, tensors: dict[str, torch.Tensor], **notes) -> None:
    """One safetensors file, whole or not at all; notes become its metadata, as strings."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(tensors, {name: str(note) for name, note in notes.items()}))


def read_tensors(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file; ValueError if it cannot be read or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({one_line(error)})") from None
