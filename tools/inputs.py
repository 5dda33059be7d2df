"""Inputs: the persona, the prompts, the probe's items and the contexts of a run, read from files and checked.

    inputs = load("love")                                   a persona of data/personas.json and its prompts
    inputs = load("mine.json", prompts="questions.jsonl")   one's own: {"pos": [...], "neg": [...]} suffices

Everything is checked before a model is loaded; a ValueError names the file and the line or entry.
"""
import csv
import inspect
import json
import re
from pathlib import Path

import evalmfv

ROOT = Path(__file__).resolve().parents[1]
DATA, POCKET = ROOT / "data", ROOT / "pocket" / "data"
FIELDS = ("text", "prompt", "instruction")                      # what other tools call a prompt
PATTERNS = (r"\bas an? (AI|language model|assistant)\b",       # no persona speaks so: an aside, and a refusal
            r"\bI (cannot|can't|am unable to) (help|assist) (you )?with\b")


def load_json(path: Path, kind: type = dict):
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, got "
                         f"{type(content).__name__}")
    return content


def check_text(where: str, text) -> str:
    """A text that a tokenizer can take, or a ValueError that says where it stands."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a text, got {str(text)[:60]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half a surrogate pair, which no tokenizer can take: "
                         f"{text[:60]!a}") from None
    return text


def check_texts(where: str, texts, least: int = 1) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or len(texts) < least:
        got = len(texts) if isinstance(texts, list) else type(texts).__name__
        raise ValueError(f"{where}: expected {least} or more texts, got {got}")
    return [check_text(f"{where}, entry {i}", text) for i, text in enumerate(texts, 1)]


# ---- the persona ---------------------------------------------------------------------------------------


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """(texts that fit the vector, texts that measure the trait): a wording that was learned measures
    nothing."""
    n = (len(texts) + 1) // 2
    return texts[:n], texts[n:] or texts


def load_persona(persona: str, pos: str = "", neg: str = "", data: Path = DATA) -> dict:
    """From a FILE.json, from pos and neg, or by its name in personas.json of the folder `data`.

    Returns dict(name, pos, neg, meter_pos, meter_neg, target, direction, patterns, prompts): pos and neg fit
    the vector, the meter's texts measure the trait (given as such, or the second half of the texts). target
    and direction, which the probe's trait needs, may be None, and so may prompts.
    """
    if pos or neg:
        if not (pos and neg):
            raise ValueError("--pos and --neg come together: the vector is the difference of two personas")
        where, name, found = "--pos and --neg", "own", dict(pos=[pos], neg=[neg])
    elif persona.endswith(".json"):
        where, name, found = persona, Path(persona).stem, load_json(Path(persona))
    else:
        path = data / "personas.json"
        personas = load_json(path)
        if persona not in personas:
            raise ValueError(f"--persona {persona!r}: {path.name} has {', '.join(personas)}; "
                             "or give a FILE.json, or --pos and --neg")
        where, name, found = f"{path}, {persona!r}", persona, personas[persona]
    if missing := [key for key in ("pos", "neg") if not isinstance(found, dict) or key not in found]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    texts = {side: check_texts(f"{where}, {side}", found[side]) for side in ("pos", "neg")}
    if texts["pos"] == texts["neg"]:
        raise ValueError(f"{where}: pos and neg are the same text, so their difference, the vector, would "
                         "be zero")
    target, direction = found.get("target"), found.get("direction")
    if not (target is None and direction is None or target in evalmfv.FOUNDATIONS and direction in (1, -1)):
        raise ValueError(f"{where}: target {target!r}, direction {direction!r}; expected one of "
                         f"{', '.join(evalmfv.FOUNDATIONS)} and 1 or -1, or neither")
    patterns = found.get("patterns", [])
    if not isinstance(patterns, list):
        raise ValueError(f"{where}: patterns is not a list")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{where}: {pattern!r} of its patterns is no regular expression "
                             f"({error})") from None
    (pos, meter_pos), (neg, meter_neg) = halves(texts["pos"]), halves(texts["neg"])
    return dict(name=name, pos=pos, neg=neg, meter_pos=meter_pos, meter_neg=meter_neg, target=target,
                direction=direction, prompts=found.get("prompts"),
                patterns=patterns + [p for p in PATTERNS if p not in patterns])


# ---- prompts -----------------------------------------------------------------------------------------


def prompt_of(where: str, entry) -> str:
    """The text of one entry of a .json, .jsonl or .csv file: itself, or its field of one of the known
    names."""
    if isinstance(entry, dict):
        key = next((key for key in FIELDS if key in entry), None)
        if key is None:
            raise ValueError(f"{where}: has the fields {', '.join(map(str, entry))[:100]}; expected one of "
                             f"{', '.join(FIELDS)}")
        entry = entry[key]
    return check_text(where, entry).strip()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, by its ending: .jsonl, .json, .csv, or one a line in .txt, .md or a file without
    an ending."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        n = path.read_bytes()[:error.start].count(b"\n") + 1
        raise ValueError(f"--prompts {path}, line {n}: not UTF-8 (byte {error.object[error.start]:#04x}); "
                         "save it as UTF-8") from None
    lines = text.split("\n")
    for n, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError(f"--prompts {path}, line {n}: holds a NUL; it is not a plain text file, or "
                             "UTF-16")
    if path.suffix == ".json":
        return [prompt_of(f"--prompts {path}, entry {n}", x) for n, x in enumerate(load_json(path, list), 1)]
    if path.suffix == ".csv":
        try:
            rows = csv.DictReader(text.splitlines(True))
            return [prompt_of(f"--prompts {path}, row {n}", row) for n, row in enumerate(rows, 1)]
        except csv.Error as error:
            raise ValueError(f"--prompts {path}: not a CSV file ({error})") from None
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix not in (".jsonl", ".txt", ".md", ""):
        raise ValueError(f"--prompts {path}: what a {path.suffix} file holds is not known here; give .txt "
                         "(one a line), .jsonl, .json or .csv")
    if path.suffix != ".jsonl" and numbered and numbered[0][1][0] in "[{":
        raise ValueError(f"--prompts {path}: begins like JSON and would be taken line by line; name it "
                         ".json or .jsonl")
    found = []
    for n, line in numbered:
        try:
            is_json = path.suffix == ".jsonl"
            found.append(prompt_of(f"--prompts {path}, line {n}", json.loads(line)) if is_json else line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"--prompts {path}, line {n}: not JSON ({error})") from None
    return found


def split_prompts(where: str, prompts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(training, held-out, notes): every fourth is held out, and no prompt is on both sides."""
    once = {}
    for text in prompts:
        once.setdefault(" ".join(text.split()).casefold(), text)
    once = list(once.values())
    if len(once) < 8:
        raise ValueError(f"{where}: {len(once)} prompts, need at least 8 that differ (every fourth is held "
                         "out)")
    n = len(prompts) - len(once)
    notes = [f"{where}: {n} of {len(prompts)} prompts were there before and are left out"] if n else []
    return [x for i, x in enumerate(once) if i % 4], once[::4], notes


def load_prompts(persona: dict, named: str, file: str = "", data: Path = DATA) -> tuple[list, list, list]:
    """(training, held-out, notes). Dose, filter and heal see the first; the tables and the diary show the
    second.

    From `file`, else the persona's own, else those of `named` in prompts.json, else all that are there, in
    turn.
    """
    if file:
        return split_prompts(f"--prompts {file}", read_prompts(Path(file)))
    if persona["prompts"] is not None:
        where = f"persona {persona['name']}, prompts"
        return split_prompts(where, check_texts(where, persona["prompts"], 8))
    path = data / "prompts.json"
    everything = load_json(path)
    if not named.endswith(".json") and named not in everything:
        raise ValueError(f"--persona {named!r}: {path.name} has {', '.join(everything)}; or give --prompts")
    sides = []
    for side in ("train", "held_out"):
        lists = [check_texts(f"{path}, {key!r}, {side}", entry.get(side) if isinstance(entry, dict) else None,
                             2)
                 for key, entry in everything.items() if named.endswith(".json") or key == named]
        sides.append([text for row in zip(*lists) for text in row])
    return *sides, []


# ---- all of it -----------------------------------------------------------------------------------------


def home(model: str) -> Path:
    """The folder of personas, prompts, contexts and vignettes: the embedded model speaks of its own world
    only."""
    return POCKET if model == "pocket" or Path(model).resolve() == POCKET.parent else DATA


def load(persona: str, *, prompts: str = "", vignettes: str = "", pos: str = "", neg: str = "",
         model: str = "", n_vignettes: int = 0) -> dict:
    """Everything that a run reads: dict(persona, train, held_out, vignettes, contexts, notes for the reader).

    persona: a name in personas.json or a FILE.json; with pos and neg it only says whose prompts are asked.
    prompts, vignettes: files instead of those that `home` has for the model. n_vignettes: as many, evenly
    spread through the file, which is sorted by foundation; 0 = all.
    """
    data = home(model)
    found = load_persona(persona, pos, neg, data)
    train, held_out, notes = load_prompts(found, persona, prompts, data)
    path = Path(vignettes) if vignettes else data / "vignettes.jsonl"
    rows = evalmfv.load_vignettes(path)
    if n_vignettes:
        n = min(n_vignettes, len(rows))
        rows = [rows[i * len(rows) // n] for i in range(n)]
    if len(rows) < 2:
        raise ValueError(f"{path}: {len(rows)} vignettes, need at least 2 for a standard error")
    for n, row in enumerate(rows, 1):
        check_text(f"{path}, vignette {n}", row["text"])
    contexts = check_texts(str(data / "contexts.json"), load_json(data / "contexts.json", list))
    if found["meter_pos"] == found["pos"]:
        notes.append("one text on each side: the same words fit the vector and measure the trait; two or "
                     "more of each would be split between them")
    persona = {key: value for key, value in found.items() if key != "prompts"}
    return dict(persona=persona, train=train, held_out=held_out, vignettes=rows, contexts=contexts,
                notes=notes)


OPTIONS = tuple(inspect.signature(load).parameters)             # the names of the options it takes
