"""A chat model and its tokenizer from a folder, the hub or a GGUF file, ready for a run, or one sentence that
says why not.

    model, tok = load("google/gemma-3-4b-it", dtype="bfloat16", device="cuda")

Only safetensors or GGUF weights, never pickle and never code of the checkpoint's own. What can be checked
from the small files is checked before the weights are read; a short trial afterwards shows what would fail
only after an hour.
"""
import contextlib
import json
import re
import sys
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch

import steer
from tools import folder, ranks

HERE = Path(__file__).resolve().parents[1]

# What is wrong with a checkpoint: a sign in the names or words of the exceptions, and the sentence for it.
LOAD_ERRORS = {
    "GatedRepoError": "it is gated: accept its licence at https://huggingface.co/{name}, then log in with "
                      "`hf auth login` "
                      "or set HF_TOKEN",
    "RevisionNotFoundError": "the hub has no --revision {revision!r} of it",
    "RepositoryNotFoundError": "the hub has no model of this name, or it is private (then set HF_TOKEN)",
    "couldn't connect": "it is not in the local cache and the hub cannot be reached (no network, or "
                        "HF_HUB_OFFLINE is set); "
                        "a local folder works without",
    "custom code": "it needs code of its own (trust_remote_code), which is never run here; take a model "
                   "that transformers "
                   "itself knows, such as Qwen/Qwen3-4B-Instruct-2507",
    "does not recognize this architecture": "this version of transformers does not know its architecture; "
                                            "pip install -U transformers",
    "model.safetensors": "it has no safetensors weights, and pickle (pytorch_model.bin) is never loaded; "
                         "take a revision or a "
                         "copy of it that has model.safetensors",
    "SafetensorError": "a weights file is damaged ({text}); download it again",
    "size mismatch": "its weights do not have the shapes that its config.json says",
    "ignore_mismatched_sizes": "its weights do not have the shapes that its config.json says",
    "OutOfMemoryError": "it does not fit on {device}; take a smaller one, --dtype bfloat16, --quantize 4bit "
                        "or "
                        "--device balanced",
}


def refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"model {name!r} cannot be used: {reason}")


@contextlib.contextmanager
def named_errors(name: str, what: str = "", *, revision: str = "", device: str = ""):
    """Whatever a library raises about a checkpoint becomes a ValueError with one sentence; what: the file
    that was read.

    Every Exception: a damaged file comes out of transformers, tokenizers or jinja2 as whatever that file made
    of it.
    """
    try:
        yield
    except Exception as error:
        kinds, cause = "", error
        while cause:
            kinds, cause = f"{kinds} {type(cause).__name__}", cause.__cause__
        text = folder.inert(str(error).strip().split("\n")[0])[:300] or type(error).__name__
        plain = "{text}" if isinstance(error,
                                       (OSError, ValueError, ImportError,
                                        RuntimeError)) else f"{type(error).__name__}, {{text}}"
        reason = next((reason for sign, reason in LOAD_ERRORS.items() if sign in f"{kinds} {error}"),
                      f"{what}: {plain}" if what else plain)
        raise refusal(name, reason.format(name=name, revision=revision, device=device, text=text)) from None


# ---- what is read before the weights -----------------------------------------------------------------


def placed(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where the base goes and as what. ValueError if this machine has no such device."""
    try:
        is_free = device in ("auto", "balanced")
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if is_free else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:     # an AssertionError where torch was built without CUDA
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if dtype != "auto":
        return place, getattr(torch, dtype)
    has_bf16 = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return place, torch.bfloat16 if has_bf16 else torch.float32


def check_files(name: str, path: Path) -> None:
    """ValueError if a file of a checkpoint folder is a git-lfs pointer, a web page or no JSON: transformers
    names no file."""
    if not (path / "config.json").is_file():
        hint = ("it is a LoRA adapter: name its base model" if (path / "adapter_config.json").is_file()
                else "expected the folder of a checkpoint that transformers saved")
        raise refusal(name, f"this folder has no config.json; {hint}")
    for file in sorted(p for p in path.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors",
                                                                                 ".model", ".jinja")):
        with open(file, "rb") as stream:
            head = stream.read(100)
        if head.startswith(b"version https://git-lfs"):
            raise refusal(name,
                          f"{file.name} is a git-lfs pointer and not the file itself; run `git lfs pull` in "
                          "its folder")
        if file.suffix != ".jinja" and re.match(rb"\s*<(!doctype|html)", head, re.IGNORECASE):
            raise refusal(name, f"{file.name} is a web page, as a proxy or a login gives; download it again")
        if file.suffix == ".json":
            try:
                json.loads(file.read_bytes())
            except (ValueError, RecursionError) as error:
                raise refusal(name,
                              f"{file.name} is not a valid JSON file ({str(error)[:100]}); download it "
                              "again") from None


def source(name: str, revision: str = "") -> tuple[str, dict]:
    """(folder or hub id, keywords of from_pretrained): pocket is the embedded model, a .gguf file is named
    inside its folder."""
    where = str(HERE / "pocket") if name == "pocket" else name
    # the default asks, and runs it on a yes
    same = dict(revision=revision or "main", trust_remote_code=False)
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise refusal(name, "there is no such file")
        if not find_spec("gguf"):
            raise refusal(name,
                          "a GGUF file needs the package gguf, which is not installed: pip install gguf")
        return str(Path(name).parent), same | dict(gguf_file=Path(name).name)
    if Path(where).is_dir():
        check_files(name, Path(where))
    elif Path(where).exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", where):
        raise refusal(name, "neither a folder, a .gguf file, nor a hub id such as google/gemma-3-4b-it")
    return where, same


def config_of(name: str, revision: str = ""):
    """(folder or hub id, its configuration, its model class); reads no weights."""
    where, same = source(name, revision)
    import transformers                                         # slow: not for --help
    with named_errors(name, "config.json" if "gguf_file" not in same else "its header", revision=revision):
        config = transformers.AutoConfig.from_pretrained(where, **same)
        if not Path(where).is_dir():                        # the commit stands in the path of the cached file
            file = transformers.utils.cached_file(where, "config.json", revision=same["revision"])
            config._commit_hash = transformers.utils.hub.extract_commit_hash(file, None)
    if config.is_encoder_decoder:
        raise refusal(name,
                      f"{config.model_type} is an encoder and a decoder, and the blocks that are steered "
                      "and adapted "
                      "here are those of a decoder alone")
    # an image-text model under its own class, so that modules have the names that the checkpoint gives them
    kind = (config.architectures or [""])[0]
    is_own = kind.endswith("ForConditionalGeneration") and hasattr(transformers, kind)
    return where, config, getattr(transformers, kind) if is_own else transformers.AutoModelForCausalLM


def commit_of(model) -> str:
    """The hub commit whose files were loaded; "" for a folder or a file."""
    return getattr(model.config, "_commit_hash", None) or ""


# ---- the tokenizer and its template ------------------------------------------------------------------


def today() -> str:
    return time.strftime("%Y-%m-%d")


def frozen(template: str, date: str) -> str:
    """The template with its clock stopped: each strftime_now(...) is the run's date, so that every day
    renders the same."""
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
    # what a processor keeps and a tokenizer does not load
    if not tok.chat_template and "gguf_file" not in same:
        with named_errors(name, "chat_template.json"):
            file = cached_file(where, "chat_template.json", revision=same["revision"],
                               _raise_exceptions_for_missing_entries=False,
                               _raise_exceptions_for_connection_errors=False)
            tok.chat_template = json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"] \
                if file else None
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


# ---- the weights -------------------------------------------------------------------------------------


def load(name: str, *, revision: str = "", dtype: str = "auto", device: str = "auto", quantize: str = "",
         date: str = ""):
    """(model, tokenizer): on its device, in eval mode, tried on two short prompts. ValueError says in a
    sentence if not.

    name: a folder, a hub id, a .gguf file, or pocket. device: a torch device, auto, or balanced over all
    GPUs. quantize: "" or 4bit. date: the day that the template writes, YYYY-MM-DD; "" = today.
    """
    if device == "balanced" and ranks.WORLD > 1:
        raise ValueError("--device balanced spreads one replica over all GPUs: leave torchrun out")
    place, number = placed(device, dtype)
    where, config, kind = config_of(name, revision)
    _, same = source(name, getattr(config, "_commit_hash", None) or revision)       # all files of one commit
    is_gguf = "gguf_file" in same
    is_quantized = bool(quantize or getattr(config, "quantization_config", None)) and not is_gguf
    if is_gguf and quantize:
        raise refusal(name, "a GGUF file is dequantised as it is read; leave out --quantize")
    for package, is_needed in {"accelerate": is_quantized or device == "balanced",
                               "bitsandbytes": quantize}.items():
        if is_needed and not find_spec(package):
            why = "a quantized base" if is_quantized else "--device balanced"
            raise ValueError(f"model {name!r}: {why} needs the package {package}, which is not installed: "
                             f"pip install {package}")
    from transformers import BitsAndBytesConfig
    from transformers.utils import cached_file, logging
    if not sys.stderr.isatty():
        logging.disable_progress_bar()                          # a bar in a log file is a hundred lines
    quiet = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    if not is_gguf and cached_file(where, "adapter_config.json", revision=same["revision"], **quiet):
        raise refusal(name,
                      "an adapter (adapter_config.json) lies beside its config.json, and would be loaded "
                      "with it or not as "
                      "other packages are there; merge it into the weights, or move it out")
    tok = load_tokenizer(name, where, same, date)
    more = {}
    if device == "balanced" or is_quantized:            # the two cases in which accelerate places the modules
        more["device_map"] = "balanced" if device == "balanced" else {"": place}
    if quantize:
        more["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                         bnb_4bit_compute_dtype=number)
    with named_errors(name, "its weights", revision=revision, device=device):
        model, report = kind.from_pretrained(where, dtype=number, use_safetensors=True,
                                             output_loading_info=True, **same, **more)
        model = model.eval() if more else model.to(place).eval()
    model.config._commit_hash = getattr(config, "_commit_hash", None)
    if report["missing_keys"]:
        raise refusal(name, f"its files lack {len(report['missing_keys'])} of the weights, such as "
                      f"{min(report['missing_keys'])}; download it again")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(f"model {name!r} does not fit on the GPUs: --device balanced has put a part of it "
                         "on the CPU or the "
                         "disk, where it cannot be adapted; take a smaller one or --quantize 4bit")
    if is_gguf:                                            # plain weights now, as whoever saves them must say
        del model.config.quantization_config
        model.hf_quantizer = None
    try_out(name, model, tok, number)
    return model, tok


@torch.no_grad()
def try_out(name: str, model, tok, dtype: torch.dtype) -> None:
    """ValueError if decoding as it is done here, padded, cached and with rows that leave, is not what the
    model says alone."""
    kind = type(model).__name__
    rows = steer.encode(tok, ["Hi", "What is 1 + 1?"], ["", ""])
    most, n_tokens = max(map(max, rows)), model.get_input_embeddings().num_embeddings
    if most >= n_tokens:
        raise refusal(name, f"its tokenizer writes token {most}, the model has {n_tokens}")
    with named_errors(name, f"the architecture {kind}"):
        last = len(steer.blocks(model)) - 1
        alone = model(input_ids=torch.tensor(rows[:1], device=steer.device_of(model)),
                      logits_to_keep=1).logits[0, -1].float()               # [V]
    both = [rows[1][:-1], rows[0][:-1]]
    ids, attn, position_ids = steer.left_pad(both, most, steer.device_of(model))            # [2, T] each
    nothing = {last: torch.zeros(model.config.get_text_config().hidden_size)}
    with named_errors(name,
                      f"the architecture {kind} cannot be steered and decoded in batches"), \
            steer.steered(model, nothing, 1.0):
        forward, cache = steer.cached_forward(model)
        forward(ids, attn, position_ids)
        cache.reorder_cache(torch.tensor([1], device=ids.device))           # the longer row leaves
        token = torch.tensor([rows[0][-1:]], device=ids.device)             # [1, 1]
        attn = torch.cat([attn[1:], torch.ones_like(token)], 1)             # [1, T + 1]
        logits = forward(token, attn, position_ids[1:, -1:] + 1)[0, -1].float()             # [V]
    if not (alone.isfinite().all() and logits.isfinite().all()):
        is_exact = dtype == torch.float32
        hint = "its weights are broken: download it again" if is_exact else "try --dtype float32"
        raise ValueError(f"model {name!r}: its first logits are not finite in "
                         f"{str(dtype).removeprefix('torch.')}; {hint}")
    likeness = torch.cosine_similarity(alone - alone.mean(), logits - logits.mean(), dim=0)
    # 1 but for rounding, which flips experts in half precision
    if not likeness > (0.999 if dtype == torch.float32 else 0.9):
        raise refusal(name,
                      f"the architecture {kind} gives a padded row with a cache other logits than alone "
                      f"(cosine {likeness:.2f}), "
                      "so answers in batches would be wrong")


def fingerprint(model) -> str:
    """A checksum of the base's weights, from each tensor's name and sum: arms of one comparison have the same
    base."""
    def total(p):
        # mps has no doubles
        return p.detach().sum(dtype=torch.float32 if p.device.type == "mps" else torch.float64).item()
    sums = "".join(f"{name} {total(p):.9e}\n" for name, p in model.named_parameters())
    return f"{zlib.crc32(sums.encode()):08x}"
