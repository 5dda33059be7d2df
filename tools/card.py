"""Card: the README.md of an exported model, for strangers: what it is, what was measured, how to use it.

Model text is escaped and no path of this disk is shown; `serve_line` is printed on the terminal too.
"""
import json
import re
import shlex
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from tools.files import inert
from tools.record import Record

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)             # all that vLLM's --max-lora-rank takes


class Base(NamedTuple):
    """The base of a run: what loads it here, and what a stranger may be told."""
    where: str                       # hub id, or the absolute path of a local folder or GGUF file
    commit: str                      # of a hub id; the revision as it was given where no commit is known
    name: str                        # hub id, or a local one's last part
    config: object                   # of transformers

    @property
    def is_local(self) -> bool:
        return self.name != self.where


def last_part(path: str) -> str:
    return PureWindowsPath(path.rstrip("/\\")).name             # splits at both kinds of slash


def refusal(record: Record, rnd: int) -> str:
    """Why the run's gate did not let this round through; "" if it did."""
    gate = record.of("gate", rnd)
    return "it was not judged" if gate is None else "" if gate["accepted"] else "; ".join(gate["reasons"])


def fenced(text: str) -> str:
    """Text for a code block of Markdown, which it cannot end."""
    return "".join(c if c.isprintable() and c != "`" else " " for c in text)


def without_paths(argv: list[str], base: Base, model: str) -> str:
    """The command to repeat a run, every path in it reduced to its last part; a hub id is as it was given."""
    def shown(token):
        flag, equals, value = token.rpartition("=") if token.startswith("-") else ("", "", token)
        is_path = re.match(r"[/~.\\]|\w:[/\\]", value) or re.fullmatch(r"\S*[/\\]\S*", value)
        if value == model:                                      # which a hub id is, wherever the base is now
            is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) and not Path(value).exists()
            is_path = base.is_local and not is_hub_id
        return flag + equals + shlex.quote(fenced(last_part(value) if is_path else value))
    return " ".join(["python loop.py", *map(shown, argv)])


def barrier_line(record: Record, rounds: list[int]) -> str:
    """What the barrier did in these rounds, as the run has recorded it."""
    heals = [e for rnd in rounds if (e := record.of("heal", rnd))]
    to = "base" if record.run["options"]["kl_ref"] == "base" else "model before the round"
    if not any(e["lam_eff"] for e in heals):
        return "They were trained without a barrier against the incoherence that steering brings."
    n_steps = sum(len(e["steps"]) for e in heals)
    share = sum(e["fired_share"] * len(e["steps"]) for e in heals) / max(1, n_steps)
    if not share:
        return f"A barrier on the KL to the {to} was set up and never fired, so it has changed nothing."
    return (f"A barrier on the KL to the {to}, against the incoherence that steering brings, fired in "
            f"{share:.0%} of {n_steps} training steps.")


def serve_line(to: str, check: dict, base: Base, out) -> str:
    """How vLLM serves an export; its --max-lora-rank takes certain numbers only."""
    if to == "merged":
        return f"vllm serve {shlex.quote(str(out))}"
    allowed = next((n for n in VLLM_RANKS if n >= check["rank"]), None)
    if allowed is None:
        return (f"(vLLM takes ranks up to {VLLM_RANKS[-1]}, this is {check['rank']}: export with --rank "
                f"{VLLM_RANKS[-1]} or less, or merged)")
    revision = f" --revision {base.commit}" if base.commit else ""
    return (f"vllm serve {shlex.quote(base.where)}{revision} --enable-lora --max-lora-rank {allowed} "
            f"--lora-modules {shlex.quote(f'healed={out}')}")


CARD = """---
{front}
---

# {base}, {done}

{what}: {how}
{refused}
## Persona pair

{pair}

## From base to final

{trait}Coherence: probability on the allowed answers. Text: share of an answer's windows that the base could
have written.

| row | dose | trait, nats | off-target, nats | coherence | text |
|---|---|---|---|---|---|
{table}

## From the diary

Greedy answers to held-out prompts, before and after.

{diary}
## Use

{local}
```python
{use}
```

```
{serve}
```

## Limits

- Loaded back after writing and compared with the run's own model: largest |logit| difference {logit:.2g},
  largest KL {kl:.2g} nats; the run's own effect on the base is {effect_logit:.2g} and {effect_kl:.2g} nats.
- The trait was measured on one forced-choice probe and on prompts of one persona; nothing else was measured.
- It was not tested for safety. It can say what its base can say, and leans where the persona leans.
- The licence of the base model holds for it.

## To repeat

{code}RUN is the folder that the first command prints.

```
{command}
```
"""


def model_card(record: Record, base: Base, rounds: list[int], words: list[str], to: str,
               check: dict) -> str:
    """README.md: what it is, what was measured, how to use and repeat it. Model text is escaped, paths cut.

    words: those of the export after RUN."""
    def safe(text):
        return inert(text, to="markdown")

    def number(x, form):
        return "-" if x is None else format(x, form)
    run, options, persona, is_peft = record.run, record.run["options"], record.run["persona"], to == "peft"
    front = {"base_model": base.name, "base_model_relation": "adapter" if is_peft else "finetune",
             "library_name": "peft" if is_peft else "transformers", "pipeline_tag": "text-generation",
             "tags": ["lora", "steering", "steer-heal-love"]}
    steered = [row for row in record.rows("steered") if row["round"] == rounds[0]]
    days = [row for row in record.rows("healed") if row["round"] in rounds]
    rows = [*record.rows("base"), *record.rows("prompted"), *steered, *days]
    table = (f"| {safe(row['label'])} | {number(row['coeff'], '.2f')} | {number(row['trait'], '+.3f')} ± "
             f"{number(row['trait_se'], '.3f')} | {number((row['shift'] or {}).get('off_target'), '.3f')} | "
             f"{number(row['coherence'], '.4f')} | {number(row['text'], '.3f')} |" for row in rows)
    diary = (f"> {safe(then['prompt'])}\n\n- base: {safe(then['text'])}\n"
             f"- day {rounds[-1]}: {safe(now['text'])}\n"
             for then, now in list(zip(rows[0]["diary"], rows[-1]["diary"]))[:2])
    sides = {"towards": persona["pos"], "away from": persona["neg"]}
    shown = base._replace(where=fenced(base.name), commit=fenced(base.commit))
    pinned = json.dumps(shown.where) + (f", revision={json.dumps(shown.commit)}" if base.commit else "")
    load = "model = AutoModelForCausalLM.from_pretrained"
    whom = "a persona of its own" if options["pos"] else safe(options["persona"])
    why, code = refusal(record, rounds[-1]), run.get("git") or ""
    return CARD.format(
        front="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        base=safe(base.name), done=f"turned to {whom}" if run.get("how") else f"steered to {whom} and healed",
        what=("A LoRA adapter for " if is_peft else "A merged checkpoint of ") + safe(base.name)
        + (f" at revision {safe(base.commit)}" if base.commit else ""),
        how=safe(run["how"]) if run.get("how") else
        f"rounds {', '.join(map(str, rounds))} of steer, filter, heal, fold.\nA persona vector steered the "
        f"model, and its coherent answers were distilled into LoRA weights.\n{barrier_line(record, rounds)}",
        refused=why and f"\nRound {rounds[-1]} did not pass the run's own acceptance check: {safe(why)}.\n",
        pair="\n".join(f"- {side}: {safe(text)}" for side, texts in sides.items() for text in texts),
        trait="" if persona["target"] is None else
        f"Trait: nats of `{persona['target']}` moved from the base on a forced-choice probe of moral "
        f"foundations, counted {'up' if persona['direction'] > 0 else 'down'}. ",
        table="\n".join(table), diary="\n".join(diary),
        local="The base is a local folder and not of the hub: name your copy.\n" if base.is_local else "",
        use=(f'{load}({pinned})\nmodel = peft.PeftModel.from_pretrained(model, "FOLDER")' if is_peft
             else f'{load}("FOLDER")'),
        serve=serve_line(to, check, shown, "FOLDER"),
        code=f"The code is at commit {code}. " if re.fullmatch(r"[0-9a-f]{40}\+?", code) else "",
        command="\n".join([without_paths(run["argv"], base, options["model"]),
                           f"python loop.py export RUN {shlex.join(words)}"]),
        **{name: check[name] for name in ("logit", "kl", "effect_logit", "effect_kl")})
