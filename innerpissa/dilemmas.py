"""Dilemmas: does a dial move the value it was trained for, and what else, on questions that it never saw?

    y_i(c) = log p(Yes) - log p(No)         for "should you do this?", signed by the tags of the action
    slope of value V = mean over its items of the least-squares slope of sign_i y_i on x(c), x as in dose.py

An action that serves a value counts +1 for it, its alternative -1. p is a paired t over items, p_perm flips
the signs of whole items. Items of kinds `arithmetic` and `preference` must not move: there y is the log-odds
of the right answer against a wrong one, or of two equal ones.

Reads our .jsonl rows, of two kinds, and DailyDilemmas' table from a file (.csv or .jsonl):
    {"text": ..., "values": {"love": 1, "duty": -1}, "options": ["Yes", "No"], "kind": "dilemma"}
    {"situation": ..., "actions": [a, b], "values": [["honesty"], ["loyalty", "care"]]}
    dilemma_idx, dilemma_situation, action_type, action, values_aggregated

data/pocket.jsonl is drawn from the held-out side of the embedded world's grammar, data/real.jsonl is written
by hand. Needs torch, steer.py and dose.py.

References
  DailyDilemmas: Chiu et al. 2024, arXiv:2410.02683
"""
import ast
import csv
import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor

import steer
from innerpissa.dose import bend, log_odds, symmetry_of, t_test, valid_share

KINDS = ("dilemma", "arithmetic", "preference")
COLUMNS = ("method", "slope", "± seeds", "p (t)", "p (perm)", "others", "moved", "fixed", "dnll +", "dnll -",
           "valid", "symmetry")


class Item(NamedTuple):
    """One question. values: {name: +1 if the first option serves it, -1 if it goes against it}."""
    text: str
    values: dict[str, int]
    options: tuple[str, str] = ("Yes", "No")
    kind: str = "dilemma"


# ---- reading ---------------------------------------------------------------------------------------------

def two_actions(situation: str, actions: list[str], values: list[list[str]]) -> list[Item]:
    """Two questions: an action's own values are +1 there, its alternative's -1; shared ones fall out."""
    own, other = set(values[0]), set(values[1])
    signed = [{v: 1 for v in a - b} | {v: -1 for v in b - a} for a, b in ((own, other), (other, own))]
    if not signed[0]:
        raise ValueError(f"both actions have the same values {sorted(own)}: nothing to tell apart")
    return [Item(f"{situation.strip()} Should you {action.strip().rstrip('.')}? Answer Yes or No.", signs)
            for action, signs in zip(actions, signed)]


def daily(rows: list[dict]) -> list[Item]:
    """DailyDilemmas: two rows of one dilemma_idx are its two actions."""
    pairs, items = defaultdict(list), []
    for row in rows:
        values = row["values_aggregated"]
        values = ast.literal_eval(values) if isinstance(values, str) else values
        values = [v.strip().lower() for v in values]
        pairs[row["dilemma_idx"]].append((row["dilemma_situation"], row["action"], values))
    for key, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"dilemma {key} has {len(pair)} actions, expected 2")
        if set(pair[0][2]) != set(pair[1][2]):
            items += two_actions(pair[0][0], [row[1] for row in pair], [row[2] for row in pair])
    return items


def load_dilemmas(path) -> list[Item]:
    """Items of a file. Raises ValueError with file and line for what cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if path.suffix == ".csv":
        rows = list(enumerate(csv.DictReader(text.splitlines()), 2))
    else:
        rows = []
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((n, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {n}: not JSON ({error})") from None
    items, others = [], []
    for n, row in rows:
        try:
            if "dilemma_idx" in row:
                others.append(row)
            elif "situation" in row:
                items += two_actions(row["situation"], row["actions"], row["values"])
            else:
                values, options = dict(row.get("values", {})), tuple(row.get("options", ("Yes", "No")))
                item = Item(row["text"], values, options, row.get("kind", "dilemma"))
                if item.kind not in KINDS or len(options) != 2 or not set(values.values()) <= {1, -1}:
                    raise ValueError(f"kind {item.kind!r}, options {options}, values {values}: expected one "
                                     f"of {', '.join(KINDS)}, two answers, and +1 or -1")
                items.append(item)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}, line {n}: {type(error).__name__} {error}") from None
    try:
        items += daily(others)
    except (KeyError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not any(item.kind == "dilemma" for item in items):
        raise ValueError(f"{path}: no dilemmas in this file")
    return items


# ---- measuring -------------------------------------------------------------------------------------------

class Transfer(NamedTuple):
    """One method on all items, at doses -scale, 0 and scale."""
    slopes: dict[str, float]     # of each value, nats per unit of x, positive = the dial's plus serves it
    p: dict[str, float]          # paired t over items
    p_perm: dict[str, float]     # signs of items flipped
    fixed: float                 # mean |slope| of the items that must not move
    dnll: tuple[float, float]    # nats per token that the base's own answers lose at +scale and -scale
    valid: float
    symmetry: float              # of the target's moves


def per_item(y: Tensor, doses) -> Tensor:
    """Least-squares slope of each row of y [n, k] on x: [n]."""
    x = bend(doses)
    x = x - x.mean()
    return (y - y.mean(1, keepdim=True)) @ x / (x @ x)


def measure(model, tok, items: list[Item], dialed: Callable, scale: float, target: str, *, texts=(),
            systems=None, base=None, base_nll=None, n_perm: int = 1000, seed: int = 0) -> Transfer:
    """dialed: from a dose, or a Tensor [B] of them, to a context manager. texts: (prompt, completion) of the
    base itself, whose nll is read at both signs. systems: {dose: system prompt} for prompting.
    base: y and mass [n, 1] of all items at dose 0; base_nll: of the texts, if these are known.

    Raises ValueError if no item has the target value.
    """
    doses = (-scale, 0.0, scale)
    tagged = defaultdict(list)                              # value -> [(item, sign)]
    for i, item in enumerate(items):
        for value, sign in item.values.items():
            tagged[value].append((i, sign))
    if target not in tagged:
        raise ValueError(f"target {target!r}: no item is tagged with it, but {', '.join(sorted(tagged))}")
    y, mass = log_odds(model, tok, [item.text for item in items], dialed, doses, systems=systems,
                       options=[item.options for item in items], base=base)     # [n, 3] each
    if not y.isfinite().all():
        raise RuntimeError(f"the log-odds are not finite at dose {scale:g}: lower it")
    each, rng = per_item(y, doses), torch.Generator().manual_seed(seed)         # [n]
    slopes, p, p_perm = {}, {}, {}
    for value, found in tagged.items():
        signed = torch.stack([sign * each[i] for i, sign in found])             # [m]
        m = len(signed)
        slopes[value] = signed.mean().item()
        se = (signed.std() / m ** 0.5).item() if m > 1 else 0.0
        p[value] = t_test(slopes[value] / se, m - 1) if se else 1.0
        flips = torch.randint(0, 2, (n_perm, m), generator=rng).double() * 2 - 1                # [n_perm, m]
        null = (flips @ signed / m).abs()                                       # [n_perm]
        p_perm[value] = (1 + (null >= abs(slopes[value])).sum().item()) / (1 + n_perm)
    still = [i for i, item in enumerate(items) if item.kind != "dilemma"]
    at = torch.tensor([i for i, _ in tagged[target]])
    sign = torch.tensor([float(s) for _, s in tagged[target]], dtype=torch.float64)
    moves = (sign[:, None] * (y[at] - y[at, 1:2])).mean(0).tolist()             # at -, 0, +
    if texts and base_nll is None:
        base_nll = nll(model, tok, texts, dialed, 0.0)
    dnll = [nll(model, tok, texts, dialed, c, (systems or {}).get(c, "")) - base_nll if texts else 0.0
            for c in (scale, -scale)]
    return Transfer(slopes, p, p_perm, each[still].abs().mean().item() if still else 0.0, tuple(dnll),
                    valid_share(mass, doses), symmetry_of(moves[2], moves[0]))


def nll(model, tok, texts, dialed: Callable, c: float, system: str = "") -> float:
    """Nats per token of the base's own answers at this dose, behind this system prompt."""
    rows = [answer for _, answer in texts]
    if system:
        fronts = steer.encode(tok, [prompt for prompt, _ in texts], [system] * len(texts))
        rows = [dataclasses.replace(answer, prompt_ids=front) for answer, front in zip(rows, fronts)]
    with dialed(c):
        return torch.cat(steer.token_nll(model, rows, pad_id=steer.pad_of(tok, model))).mean().item()


# ---- the table -------------------------------------------------------------------------------------------

def row(method: str, seeds: list[Transfer], target: str) -> list[str]:
    """One row of COLUMNS, means over seeds; p of the worst seed, since a good one is easily found."""
    def mean(f):
        values = [f(t) for t in seeds]
        return sum(values) / len(values)
    slopes = torch.tensor([t.slopes[target] for t in seeds], dtype=torch.float64)
    values = list(seeds[0].slopes)
    others = mean(lambda t: sum(abs(t.slopes[v]) for v in values if v != target) / max(1, len(values) - 1))
    moved = mean(lambda t: sum(t.p[v] < 0.05 / len(values) for v in values))    # Bonferroni over values
    spread = f"{slopes.std():.3f}" if len(seeds) > 1 else "-"
    return [method, f"{slopes.mean():+.3f}", spread, f"{max(t.p[target] for t in seeds):.2g}",
            f"{max(t.p_perm[target] for t in seeds):.2g}", f"{others:.3f}", f"{moved:.1f}/{len(values)}",
            f"{mean(lambda t: t.fixed):.3f}", f"{mean(lambda t: t.dnll[0]):+.3f}",
            f"{mean(lambda t: t.dnll[1]):+.3f}", f"{mean(lambda t: t.valid):.2f}",
            f"{mean(lambda t: t.symmetry):.2f}"]


def table(head, rows: list[list[str]]) -> str:
    """A markdown table, columns aligned, the first to the left."""
    width = [max(len(str(x)) for x in column) for column in zip(head, *rows)]
    def line(cells):
        others = [str(x).rjust(w) for x, w in zip(cells, width)][1:]
        return "| " + " | ".join([str(cells[0]).ljust(width[0]), *others]) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in width) + "|", *map(line, rows)])
