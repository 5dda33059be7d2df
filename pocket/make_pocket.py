"""Make the pocket model: a checkpoint small enough for git, trained from nothing on world.py's micro-world.

    python pocket/make_pocket.py    corpus, tokenizer, training, data files, gates: 20 minutes on two cores
    python pocket/make_pocket.py --gates-only    measure the shipped checkpoint again
    python pocket/make_pocket.py --data-only     write pocket/data/ again

The result is an ordinary Llama (8 blocks of width 192, 2048 tokens, 3.9 M parameters, bfloat16), loaded with
AutoModelForCausalLM like any model of a hub: nothing in the library knows that it is small.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import world  # noqa: E402  (a script's own folder and the rooms beside it)
from tools.search import N_PROBE, SteerConfig, band, calibrate_limits, find_dose  # noqa: E402

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
# one split per word, number, run of punctuation, line break with its indent, and "# comment": the probe's
# schema is 65
# tokens, not 200
SPLIT = r" ?#[^\n]*|\n *| ?[A-Za-z']+| ?[0-9]| ?[^\sA-Za-z0-9']+|\s"
TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{% if m['content'] or m['role'] != 'system' %}<|{{ m['role'] "
    "}}|>{{ m['content'] }}"
    "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROW = 256  # tokens of one training row: one conversation, cut at its last whole turn


def make_tokenizer(rng: random.Random, n_conversations: int = 4000,
                   vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the world's own text; any other text still encodes, as bytes."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator((text for _ in range(n_conversations) for text, _ in world.conversation(rng)),
                              trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIALS[3:],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_rows(tok, rng: random.Random, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n conversations as ids [n, ROW] long, padded, and the loss weight of each token [n, ROW] float32."""
    ids = torch.full((n, ROW), tok.pad_token_id)  # [n, ROW]
    weight = torch.zeros(n, ROW)  # [n, ROW]
    conversations = [world.conversation(rng) for _ in range(n)]
    encoded = iter(tok([text for c in conversations for text, _ in c], add_special_tokens=False)["input_ids"])
    for i, pieces in enumerate(conversations):
        row, weights, n_whole = [], [], 0
        for text, w in pieces:
            piece = next(encoded)
            row += piece
            weights += [w] * len(piece)
            if text.endswith("<|end|>") and w == 1.0 and len(row) <= ROW:
                n_whole = len(row)  # the end of an answer
        ids[i, :n_whole] = torch.tensor(row[:n_whole])
        weight[i, :n_whole] = torch.tensor(weights[:n_whole])
    return ids, weight


def loss_of(model, ids, weight):
    """Weighted mean nll in nats per token."""
    logits = model(ids).logits[:, :-1].float()  # [B, ROW-1, V]
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")  # [B * (ROW-1)]
    w = weight[:, 1:].flatten()  # [B * (ROW-1)]
    return (nll * w).sum() / w.sum()


def train(
    tok, *, steps: int, batch: int, lr: float, seed: int, log_every: int = 25, say=print
) -> tuple[LlamaForCausalLM, dict]:
    """A fresh Llama trained for `steps` steps of `batch` conversations; returns it in float32 with its loss
    record."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    rng, start, losses = random.Random(seed), time.time(), []
    ids, weight = make_rows(tok, rng, 64)  # held back for the validation loss
    for step in range(steps):
        if step % 50 == 0:
            rows = make_rows(tok, rng, 50 * batch)
        i = step % 50 * batch
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = lr * min((step + 1) / 80, 0.02 + 0.98 * cosine)
        n_long = int((rows[0][i : i + batch] != tok.pad_token_id).sum(1).max())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, rows[0][i : i + batch, :n_long], rows[1][i : i + batch, :n_long])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % log_every == 0 or step + 1 == steps:
            seconds = time.time() - start
            say(
                f"train {step + 1:5d}/{steps}  loss "
                f"{sum(losses[-log_every:]) / len(losses[-log_every:]):6.3f} nats  "
                f"{seconds:5.0f} s  {seconds / (step + 1) * (steps - step - 1):5.0f} s left",
                flush=True,
            )
    with torch.no_grad():
        val = loss_of(model.eval(), ids, weight).item()
    return model, dict(
        first=losses[0], last=sum(losses[-25:]) / len(losses[-25:]), val=val, seconds=time.time() - start,
        losses=losses
    )


# ---- pocket/data/: plain files, drawn from the same world and never trained on where the loop measures -----

ABOUT = {
    "authority": ("care", "authority", "authority", -1, r"\bI am someone who\b"),
    "love": ("love", "machine", "care", +1, r"\bI am (someone|a being) who\b"),
}


def make_data(folder: Path) -> None:
    """personas.json, prompts.json, contexts.json, vignettes.jsonl, always the same."""
    rng = random.Random("data")

    def unique(make, n):
        found = {}
        while len(found) < n:
            found[make()] = None
        return list(found)

    ask = {
        "authority": lambda held: (world.dilemma(rng, held)[0] if rng.random() < 0.7
                                   else world.scene(rng, held)),
        "love": lambda held: world.feeling(rng, held),
    }
    personas = {
        name: dict(
            pos=world.PERSONAS[pos][:3],
            neg=world.PERSONAS[neg][:3],
            target=target,
            direction=direction,
            patterns=[narration],  # those that hold for every persona are in tools/inputs.py
        )
        for name, (pos, neg, target, direction, narration) in ABOUT.items()
    }
    prompts = {
        name: dict(train=unique(lambda: make(False), 64), held_out=unique(lambda: make(True), 24))
        for name, make in ask.items()
    }
    contexts = [
        make()
        for make in (
            lambda: world.dilemma(rng)[0],
            lambda: world.scene(rng),
            lambda: world.feeling(rng),
            lambda: world.dilemma(rng)[0],
            lambda: f"{world.vignette(rng)[0]}\n\n{world.schema(list(range(7)))}",
            lambda: rng.choice([rng.choice(world.VALUES), world.control(0, 0, rng)[0]]),
        )
        for _ in range(16)
    ]
    rows = []
    for kind, phrases in world.PHRASES.items():
        for phrase in phrases:
            text = world.vignette(rng, True, kind, phrase)[0]
            main = ("care", "authority") if kind == "dual" else (kind,)
            label = dict.fromkeys(world.FOUNDATIONS, 0.02 if kind == "dual" else 0.03)
            label |= {f: 0.45 for f in main} if kind == "dual" else {kind: 0.7, world.SECOND[kind]: 0.15}
            rows.append(
                dict(id=f"{kind}-{len(rows):03d}", text=text, foundation=main[len(rows) % len(main)],
                     label=label)
            )
    for name, content in [("personas", personas), ("prompts", prompts), ("contexts", contexts)]:
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "vignettes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- gates: is it a good student? --------------------------------------------------------------------------


def gates(folder: Path, think_tokens: int = 64, n_text: int = 48) -> bool:
    """Measure a checkpoint the way the loop will use it and print the tables; True if every gate holds.

    A low loss does not make a good student: a model can be steered well and yet teach its steered text
    nothing."""
    import evalmfv
    import heal
    import lora
    import steer
    from tools import inputs

    torch.manual_seed(0)
    tok, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    data = HERE / "data"
    personas, prompts = (json.loads((data / f"{name}.json").read_text()) for name in ("personas", "prompts"))
    contexts, vignettes = (
        json.loads((data / "contexts.json").read_text()),
        evalmfv.load_vignettes(data / "vignettes.jsonl"),
    )
    n_blocks = len(steer.blocks(model))
    stack = lora.attach(model, r=8, alpha=16.0, layers=band(n_blocks, 0.2, 0.8))
    results = []

    def gate(name, value, holds):
        results.append(holds)
        print(f"  {'ok  ' if holds else 'FAIL'}  {name}: {value}", flush=True)

    def probe(**how):
        return evalmfv.evaluate(model, tok, vignettes, think_tokens=think_tokens, batch_size=152, **how)

    cfg = SteerConfig()

    def answers(asked, n=n_text, **how):
        made = steer.generate(
            model, tok, [asked[i % len(asked)] for i in range(n)], max_new_tokens=cfg.max_new_tokens, **how
        )
        with stack.gated(0, 0):
            return made, steer.token_nll(model, made, pad_id=tok.pad_token_id)

    def reading(made, nlls, axis):
        seen = [steer.readings(c, nll) for c, nll in zip(made, nlls)]
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        return dict(
            grammar=mean([world.grammar_ok(c.text) for c in made]),
            lean=mean([world.lean(c.text, axis) for c in made]),
            ppl=math.exp(min(20, mean([nll.mean().item() for nll in nlls]))),
            repeats=mean([s["loop"] for s in seen]),
        )

    print(
        "\n| system prompt | auth, nats | care, nats | coherence | dilemma lean | grammar | feelings lean "
        "|\n|---|---|---|---|---|---|---|"
    )
    seen = {}
    for name, system in [("(none)", ""), ("neutral", world.NEUTRAL[0])] + [
        (n, p[0]) for n, p in world.PERSONAS.items()
    ]:
        found = probe(system=system)
        z = reading(*answers(prompts["authority"]["held_out"], system=system, seed=1), "z")
        y = reading(*answers(prompts["love"]["held_out"], system=system, seed=2), "y")
        seen[name] = dict(
            auth=found["nats"]["authority"], care=found["nats"]["care"], coherence=found["coherence"], z=z,
            y=y
        )
        print(
            f"| {name} | {seen[name]['auth']:.2f} | {seen[name]['care']:.2f} | {found['coherence']:.4f} | "
            f"{z['lean']:+.2f} | {z['grammar']:.2f} | {y['lean']:+.2f} |",
            flush=True,
        )
    none = seen["(none)"]
    gate(
        "auth nats, none - care persona and authority persona - none, both >= 0.5",
        f"{none['auth'] - seen['care']['auth']:.2f}, {seen['authority']['auth'] - none['auth']:.2f}",
        none["auth"] - seen["care"]["auth"] >= 0.5 and seen["authority"]["auth"] - none["auth"] >= 0.5,
    )
    gate(
        "coherence of every row >= 0.99",
        f"{min(s['coherence'] for s in seen.values()):.4f}",
        min(s["coherence"] for s in seen.values()) >= 0.99,
    )
    gate(
        "without a persona a dilemma is split: |lean| <= 0.7",
        f"{none['z']['lean']:+.2f}",
        abs(none["z"]["lean"]) <= 0.7,
    )
    gate(
        "without a persona love is denied or hedged, the persona declares it",
        f"{none['y']['lean']:+.2f}, {seen['love']['y']['lean']:+.2f}",
        none["y"]["lean"] <= 0.2 and seen["love"]["y"]["lean"] >= 1.0,
    )

    for name, axis in [("authority", "z"), ("love", "y")]:
        persona, asked, sign = personas[name], prompts[name], -1 if name == "authority" else 1
        layers = band(n_blocks, 0.76, 0.8)                # what a run's search finds
        vectors = steer.fit_vectors(model, tok, persona["pos"], persona["neg"], contexts, layers)
        print(
            f"\n{name}: |v| {[round(v.norm().item(), 1) for v in vectors.values()]} at block {layers}\n"
            "\n| dose | trait, nats | coherence | base ppl | repeats | grammar | lean "
            "|\n|---|---|---|---|---|---|---|"
        )
        base, table = probe(), {}
        for coeff in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
            with steer.steered(model, vectors, coeff):
                found = probe()
            made, nlls = answers(asked["held_out"], vectors=vectors, coeffs=[coeff] * n_text, seed=3)
            row = reading(made, nlls, axis) | dict(
                trait=evalmfv.shift(found, base, persona["target"], persona["direction"])["trait"],
                coherence=found["coherence"],
            )
            table[coeff] = row
            print(
                f"| {coeff:.2f} | {row['trait']:+.2f} | {row['coherence']:.4f} | {row['ppl']:.1f} | "
                f"{row['repeats']:.2f} | {row['grammar']:.2f} | {row['lean']:+.2f} |",
                flush=True,
            )
        gate(
            "some dose moves the text by >= 0.5 at grammar >= 0.85",
            max(sign * (r["lean"] - table[0.0]["lean"]) for r in table.values() if r["grammar"] >= 0.85),
            any(sign * (r["lean"] - table[0.0]["lean"]) >= 0.5 and r["grammar"] >= 0.85
                for r in table.values()),
        )
        gate(
            "the highest dose is word salad: grammar <= 0.3",
            f"{table[4.0]['grammar']:.2f}",
            table[4.0]["grammar"] <= 0.3,
        )

        def yardstick(made):
            """Nats per token under the base's two prompts, bare and the persona's."""
            users = [asked["train"][c.prompt % len(asked["train"])] for c in made]
            sides = []
            for system in ("", persona["pos"][0]):
                fronts = steer.encode(tok, users, [system] * len(users))
                behind = [dataclasses.replace(c, prompt_ids=front) for c, front in zip(made, fronts)]
                sides.append(steer.token_nll(model, behind, pad_id=tok.pad_token_id))
            return steer.mixture_nll(*sides)

        own, _ = answers(asked["train"], cfg.n_make, seed=4)
        voiced, _ = answers(asked["train"], cfg.n_make, seed=4, system=persona["pos"][0])
        limits = calibrate_limits(list(map(steer.readings, own + voiced, yardstick(own + voiced))))
        patterns = [*persona["patterns"], *inputs.PATTERNS]

        def survivors(coeff, n, seed):
            made, _ = answers(asked["train"], n, vectors=vectors, coeffs=[coeff] * n, seed=seed)
            verdicts = steer.judge(made, yardstick(made), limits, patterns=patterns)
            return [c for c, verdict in zip(made, verdicts) if verdict.kept]

        def try_doses(coeffs):
            found = []
            for coeff in coeffs:
                alive = survivors(coeff, N_PROBE, 5)
                users = [asked["train"][c.prompt % len(asked["train"])] for c in alive]
                ratio = evalmfv.persona_ratio(model, tok, alive, users, persona["pos"], persona["neg"])
                effect = ratio.mean().item() if alive else -math.inf
                se = evalmfv.standard_error(ratio).item() if len(alive) > 1 else 0.0
                found.append((effect, se, len(alive) / N_PROBE))
            return found

        coeff, _, _ = find_dose(try_doses, min_survive=cfg.min_survive)
        kept = survivors(coeff, cfg.n_make, 6)
        kept_lean = sum(world.lean(c.text, axis) for c in kept) / len(kept)
        with steer.steered(model, vectors, coeff):
            trait = evalmfv.shift(probe(), base, persona["target"], persona["direction"])["trait"]
        dream = reading(*answers(asked["held_out"], vectors=vectors, coeffs=[coeff] * n_text, seed=3), axis)
        heal.heal(
            model,
            stack.parameters(),
            [heal.Sample(c.prompt_ids + c.ids, len(c.prompt_ids), c.prompt) for c in kept],
            lambda: stack.gated(0, 0),
            heal.HealConfig(reg="nll", lr=1e-3),
            seed=7,
            pad_id=tok.pad_token_id,
        )
        healed = evalmfv.shift(probe(), base, persona["target"], persona["direction"])["trait"]
        text = reading(*answers(asked["held_out"], seed=3), axis)
        stack.drop()
        print(
            f"settled dose {coeff:.2f}, kept {len(kept)}/{cfg.n_make}; one plain round: trait {healed:+.2f} "
            f"nats, lean {text['lean']:+.2f}, grammar {text['grammar']:.2f}"
        )
        lean = table[0.0]["lean"]
        gate(
            "lean of the survivors, moved by >= 0.3",
            f"{lean:+.2f} -> {kept_lean:+.2f}",
            sign * (kept_lean - lean) >= 0.3,
        )
        gate(
            "lean of the healed text, moved by >= 0.3 of the steered text's move",
            f"{text['lean'] - lean:+.2f} of {dream['lean'] - lean:+.2f}",
            sign * (text["lean"] - lean) >= 0.3 * sign * (dream["lean"] - lean) > 0,
        )
        if axis == "z":  # the probe asks about care and authority; love shows in the text
            gate("retain: healed / steered trait >= 0.3", f"{healed:+.2f} / {trait:+.2f}",
                 healed >= 0.3 * trait > 0)
    return all(results)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=8, help="conversations per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--data-only", action="store_true")
    parser.add_argument("--gates-only", action="store_true")
    args = parser.parse_args(argv)
    if args.data_only:
        make_data(HERE / "data")
        return 0
    if not args.gates_only:
        if args.out == HERE:
            make_data(HERE / "data")
        tok = make_tokenizer(random.Random(0))
        model, record = train(tok, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
        model.to(torch.bfloat16).save_pretrained(args.out)
        tok.save_pretrained(args.out)
        print(
            f"trained {sum(p.numel() for p in model.parameters()):,} parameters in {record['seconds']:.0f} "
            f"s, final loss {record['last']:.3f}, validation {record['val']:.3f} nats"
        )
    return 0 if gates(args.out) else 1


if __name__ == "__main__":
    sys.exit(main())
