"""Record: a run as it stands on the disk, finished or not: the one reader of run.json and events.jsonl."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

FORMAT = 2                                              # of the journal: another one cannot be read


@dataclass(frozen=True)
class Record:
    """A run as it stands on the disk. notes: sentences on what is not whole."""
    path: Path
    run: dict
    events: list[dict]           # in order, each with a stage (str), a round (int or None) and t (seconds)
    notes: list[str]

    def of(self, stage: str, rnd: int | None = None) -> dict | None:
        """The first event of a stage, of this round if one is given."""
        return next((e for e in self.events if e["stage"] == stage and rnd in (None, e["round"])), None)

    def rows(self, kind: str | None = None) -> list[dict]:
        """The rows of the table: base, prompted, steered or healed, or all of them."""
        return [e for e in self.events if e["stage"] == "row" and kind in (None, e.get("kind"))]

    @property
    def accepted(self) -> list[int]:
        return [e["round"] for e in self.events if e["stage"] == "gate" and e.get("accepted")]

    @property
    def last_day(self) -> dict | None:
        """The row of the last accepted day; before there is one, the base's; before that, None."""
        days = [row for row in self.rows("healed") if row["round"] in self.accepted]
        return next(iter(days[-1:] or self.rows("base")), None)

    def n_standing(self, reasons_of: Callable) -> int:
        """How many events stand if the gates are asked again: all before the first that decides otherwise.

        reasons_of(day, last accepted day, base, prompted) -> why this day is not accepted; none if it is."""
        base, prompted = (next(iter(self.rows(kind)), None) for kind in ("base", "prompted"))
        last = base
        for n, e in enumerate(self.events):
            days = [row for row in self.rows("healed") if row["round"] == e["round"]]
            if e["stage"] == "gate" and days:           # a round that broke before its day stays refused
                if bool(reasons_of(days[0], last, base, prompted)) == e["accepted"]:
                    return n
                last = days[0] if e["accepted"] else last
        return len(self.events)

    def completions(self, rnd: int) -> list[dict]:
        return (self.of("made", rnd) or {}).get("completions", [])

    def adapters(self, last: int | None = None) -> dict[int, Path]:
        """The adapter file of each accepted round up to `last`, and of `last` even if it was refused.

        ValueError if there is none."""
        files = {rnd: self.path / "rounds" / f"{rnd:02d}" / "adapter.safetensors" for rnd in self.accepted}
        if last is not None:
            refused = self.path / "rounds" / f"{last:02d}" / "rejected.safetensors"
            files |= {last: refused} if refused.is_file() else {}
            if last not in files:
                rounds = ", ".join(map(str, self.accepted)) or "none"
                raise ValueError(f"--round {last}: the accepted rounds of {self.path} are {rounds}")
            files = {rnd: path for rnd, path in files.items() if rnd <= last}
        if not files:
            raise ValueError(f"{self.path} has no accepted round")
        if missing := [path for path in files.values() if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing: the run accepted this round")
        return files


def read(path) -> Record:
    """A run folder, finished or not; ValueError if it is none, or if a line but the last is no event."""
    path = Path(path)
    try:
        run = json.loads((path / "run.json").read_bytes().decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: not a run folder, it has no run.json") from None
    except OSError as error:
        raise ValueError(f"{path}/run.json: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}/run.json: not JSON ({error})") from None
    if not isinstance(run, dict):
        raise ValueError(f"{path}/run.json: expected a JSON object, got {type(run).__name__}")
    if run.get("format") != FORMAT:
        raise ValueError(f"{path}: another version of this code wrote that run and is needed to read it or "
                         "go on with it; its run.json names the commit")
    events, notes, journal = [], [], path / "events.jsonl"
    lines = journal.read_bytes().decode("utf-8", "replace").split("\n") if journal.is_file() else []
    last = max((n for n, line in enumerate(lines, 1) if line.strip()), default=0)
    for n, line in enumerate(lines[:last], 1):
        try:
            event = {"round": None, "t": 0.0} | json.loads(line)
            if not (isinstance(event.get("stage"), str) and isinstance(event["t"], (int, float))
                    and (event["round"] is None or type(event["round"]) is int)):
                raise ValueError
            events.append(event)
        except (ValueError, TypeError, RecursionError):
            if n != last:
                raise ValueError(f"{journal}, line {n}: no event of a run; the file is damaged") from None
            notes.append(f"The last line of events.jsonl (line {n}) was cut off and is left out.")
    if not events:
        notes.append("The run has no events yet.")
    return Record(path, run, events, notes)
