"""Template: the tokenizer of a checkpoint, with its chat template and the day that this writes."""
import json
import re
import time
import zlib
from pathlib import Path

import steer
from tools.refusals import named_errors


def today() -> str:
    return time.strftime("%Y-%m-%d")


def frozen(template: str, date: str) -> str:
    """The template with its clock stopped: each strftime_now(...) is the run's date, whatever the day."""
    day = time.strptime(date, "%Y-%m-%d")

    def literal(call):
        return json.dumps(time.strftime(call[2] if call[1] else "%Y-%m-%d", day), ensure_ascii=False)
    return re.sub(r"""strftime_now\(\s*(?:(["'])(.*?)\1|[^()]*)\s*\)""", literal, template)


def load_tokenizer(name: str, where: str, same: dict, date: str = ""):
    """The tokenizer with its chat template, dated `date` (YYYY-MM-DD); ValueError if it has none."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file
    with named_errors(name, "its tokenizer (tokenizer.json, tokenizer_config.json)",
                      revision=same["revision"]):
        tok = AutoTokenizer.from_pretrained(where, **same)
    if not tok.chat_template and "gguf_file" not in same:   # a tokenizer does not load what a processor keeps
        with named_errors(name, "chat_template.json"):
            file = cached_file(where, "chat_template.json", revision=same["revision"],
                               _raise_exceptions_for_missing_entries=False,
                               _raise_exceptions_for_connection_errors=False)
            if file:
                tok.chat_template = json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]
    if not tok.chat_template:
        raise ValueError(f"model {name!r} has no chat template: a persona needs one; try its -it or "
                         "-Instruct sibling")
    try:
        templates = tok.chat_template if isinstance(tok.chat_template, dict) else {"": tok.chat_template}
        templates = {key: frozen(text, date or today()) for key, text in templates.items()}
    except ValueError:
        raise ValueError(f"date {date!r}: expected YYYY-MM-DD") from None
    tok.chat_template = templates.get("", templates)
    with named_errors(name, "its chat template"):
        steer.encode(tok, ["What is 1 + 1?"], [""])
    return tok


def template_id(tok) -> str:
    """A checksum of what makes ids of words: the template, its date included, and the tokenizer."""
    inner = tok.backend_tokenizer.to_str() if tok.is_fast else json.dumps(tok.get_vocab(), sort_keys=True)
    return f"{zlib.crc32(json.dumps([tok.chat_template, tok.all_special_tokens, inner]).encode()):08x}"


def template_notes(tok) -> list[str]:
    """What the reader of a run should know of its chat template."""
    notes = []
    if steer.render(tok, "user", "persona") == steer.render(tok, "persona\n\nuser"):
        notes.append("the chat template has no system role: the persona goes in front of the user's words")
    turn = [{"role": "user", "content": "user"}]
    if steer.render(tok, "user") != tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True):
        notes.append("the model can think, and does not here: thinking is switched off, or closed where the "
                     "template opens it")
    return notes
