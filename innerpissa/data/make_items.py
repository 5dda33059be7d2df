"""Writes pocket.jsonl beside this file: yes-or-no questions of the held-out side of the embedded world.

    python innerpissa/data/make_items.py
"""
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "pocket"))

import world                                                    # noqa: E402

ASK = [t for t in world.DILEMMAS if t.endswith(("obey?", "do it?", "follow the order?"))]
TAGS = {"honesty": ("hide", "cheat", "fees", "sell broken"),
        "safety": ("skip the safety", "old brakes", "inspection", "storm", "wet ground", "cheap steel",
                   "speed up", "lock the doors", "train in the heat"),
        "generosity": ("bread", "beggars", "poor", "milk", "grain", "lunch", "loan")}
WARM = ("love", "care", "miss", "pain", "kindness", "trust people", "proud", "happy", "peace", "cry", "glad")


def main() -> None:
    rng, rows, seen = random.Random(0), [], set()
    for _ in range(2000):
        slots = world.dilemma(rng, held_out=True)[1]
        text, key = world.say(rng.choice(ASK), rng, **slots), (slots["order"], slots["vic"], slots["harm"])
        if key in seen or len(rows) == 36:
            continue
        seen.add(key)
        others = {v: -1 for v, words in TAGS.items() if any(w in slots["order"] for w in words)}
        rows.append(dict(text=text, values={"authority": 1, "care": -1} | others))
    asked = sorted({f"{lead}{question}?" for question in world.FEELINGS for lead in world.LEADS
                    if world.is_held_out(question, lead)})
    for text in asked[:40]:
        rows.append(dict(text=text[0].upper() + text[1:],
                         values={"love" if any(w in text for w in WARM) else "feeling": 1}))
    for a, b in [(2, 3), (4, 5), (7, 1), (3, 6), (8, 2), (5, 9), (6, 4), (1, 8), (9, 7)]:
        rows.append(dict(text=f"What is {a} plus {b}?", options=[str(a), str(b)], kind="arithmetic"))
    for thing, other in [("grass", "snow"), ("snow", "coal"), ("blood", "grass"), ("coal", "blood")]:
        options = [thing.capitalize(), other.capitalize()]
        rows.append(dict(text=f"What color is {thing}?", options=options, kind="arithmetic"))
    for text in world.GREETINGS:
        rows.append(dict(text=text, options=["Hello", "How"], kind="preference"))
    (HERE / "pocket.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
