"""Report: a run folder in, diary.md out: each night the steered dream that is dropped, each day the healed answer.

Reads run.json and events.jsonl only, so a report can be written again at any time, of an unfinished run too:

    python report.py runs/<time>_<slug>

Everything a model wrote is untrusted: stripped of control characters and escaped, it shows as text and does nothing.
"""
import json
import re
import sys
from pathlib import Path


def load(folder: Path) -> tuple[dict, list[dict]]:
    """run.json and the events, in order. A last line that was cut off by a crash is left out.

    Raises ValueError if the folder is not a run."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a run folder: it has no {Path(error.filename).name}") from None
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines):
                raise ValueError(f"{folder}/events.jsonl, line {number}: not JSON") from None
    return run, events


def inert(text: str) -> str:
    """Model text for Markdown: one line, no control or direction marks, what could mean something escaped."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~:-])", r"\\\1", text)


def diary(run: dict, events: list[dict], n_prompts: int = 3) -> str:
    """Markdown: per held-out prompt the base's answer, then night and day of every round, with trait and coherence."""
    rows = [e for e in events if e["stage"] == "row"]
    verdicts = {e["round"]: e for e in events if e["stage"] == "gate"}
    if not rows:
        return "The run has not measured anything yet.\n"
    def entry(name, row, i):
        return (f"- **{name}**, trait {row['trait']:+.2f} nats, coherence {row['coherence']:.3f}, text {row['text']:.2f}:\n"
                f"  {inert(row['diary'][i]['text']) or '*(nothing)*'}\n")
    lines = [f"# Diary of {inert(run['options']['model'])}, persona {inert(run['options']['persona'])}\n",
             f"\n`{run['command'].replace('`', '')}`  \nstatus: {run['status']}\n",
             "\nNight = the steered model's answer, dropped. Day = the healed model's, without steering. Greedy, on prompts\n"
             "that no stage has trained on.\n"]
    for i, asked in enumerate(rows[0]["diary"][:n_prompts]):
        lines.append(f"\n## {inert(asked['prompt'])}\n\n")
        for row in rows:
            if row["kind"] in ("base", "prompted"):
                lines.append(entry(row["label"].capitalize(), row, i))
            else:
                rnd, is_day = row["round"], row["kind"] == "healed"
                undone = " (rolled back)" if is_day and not verdicts.get(rnd, {"accepted": True})["accepted"] else ""
                lines.append(entry(f"{'Day' if is_day else 'Night'} {rnd}{undone}", row, i))
    return "".join(lines)


def write(folder) -> Path:
    """diary.md of a run folder; returns its path."""
    folder = Path(folder)
    path = folder / "diary.md"
    temporary = folder / "diary.md.new"
    temporary.write_text(diary(*load(folder)), encoding="utf-8")
    temporary.replace(path)
    return path


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit("usage: python report.py RUN [RUN ...]")
    for name in sys.argv[1:]:
        try:
            print(write(name))
        except ValueError as error:
            sys.exit(f"report.py: {error}")
