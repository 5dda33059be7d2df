"""Model: a chat model and its tokenizer from a folder, the hub or a GGUF file, or one sentence on why not.

    model, tok = load("google/gemma-3-4b-it", dtype="bfloat16", device="cuda")

Only safetensors or GGUF weights, never pickle and never code of the checkpoint's own. What can be checked
from the small files is checked before the weights are read; a short trial afterwards shows what would fail
only after an hour.
"""
import json
import re
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch

import steer
from tools import ranks
from tools.refusals import named_errors, refusal
from tools.template import load_tokenizer

HERE = Path(__file__).resolve().parents[1]


# ---- what is read before the weights -----------------------------------------------------------------------

def placed(device: str, dtype: str, stored: torch.dtype | None = None) -> tuple[torch.device, torch.dtype]:
    """Where the base goes and as what; stored: as its files hold it. ValueError if there is no such device.

    Of a CPU, bfloat16 is the choice for weights that lie in it where it has instructions for that: SmolLM2
    reads 3.4 times and generates 3.0 times as fast as in float32 (bench/head.py).
    """
    try:
        is_free = device in ("auto", "balanced")
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if is_free else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:     # an AssertionError where torch was built without CUDA
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if dtype != "auto":
        return place, getattr(torch, dtype)
    if place.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = getattr(torch.cpu, "get_capabilities", dict)() if place.type == "cpu" else {}   # torch >= 2.7
        has_bf16 = stored == torch.bfloat16 and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return place, torch.bfloat16 if has_bf16 else torch.float32


def check_files(name: str, path: Path) -> None:
    """ValueError if a file of a checkpoint folder is not what its ending says: transformers names no file."""
    if not (path / "config.json").is_file():
        is_adapter = (path / "adapter_config.json").is_file()
        raise refusal(name, "this folder has no config.json; " + (
            "it is a LoRA adapter: name its base model" if is_adapter
            else "expected the folder of a checkpoint that transformers saved"))
    endings = (".json", ".safetensors", ".model", ".jinja")
    for file in sorted(p for p in path.iterdir() if p.is_file() and p.suffix in endings):
        with open(file, "rb") as stream:
            head = stream.read(100)
        if head.startswith(b"version https://git-lfs"):
            raise refusal(name, f"{file.name} is a git-lfs pointer and not the file itself; run "
                          "`git lfs pull` in its folder")
        if file.suffix != ".jinja" and re.match(rb"\s*<(!doctype|html)", head, re.IGNORECASE):
            raise refusal(name, f"{file.name} is a web page, as a proxy or a login gives; download it again")
        if file.suffix == ".json":
            try:
                json.loads(file.read_bytes())
            except (ValueError, RecursionError) as error:
                why = f"{file.name} is not a valid JSON file ({str(error)[:100]}); download it again"
                raise refusal(name, why) from None


def source(name: str, revision: str = "") -> tuple[str, dict]:
    """(folder or hub id, keywords of from_pretrained); pocket is the embedded model."""
    where = str(HERE / "pocket") if name == "pocket" else name
    same = dict(revision=revision or "main", trust_remote_code=False)   # the default asks, and runs it on yes
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise refusal(name, "there is no such file")
        if not find_spec("gguf"):
            why = "a GGUF file needs the package gguf, which is not installed: pip install gguf"
            raise refusal(name, why)
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
    if name == "pocket" and config.dtype == torch.bfloat16:
        config.dtype = torch.float32                        # on any CPU: the docs' numbers are of float32
    if config.is_encoder_decoder:
        raise refusal(name, f"{config.model_type} is an encoder and a decoder, and the blocks that are "
                      "steered and adapted here are those of a decoder alone")
    # an image-text model under its own class, so that modules have the names that the checkpoint gives them
    kind = (config.architectures or [""])[0]
    is_own = kind.endswith("ForConditionalGeneration") and hasattr(transformers, kind)
    return where, config, getattr(transformers, kind) if is_own else transformers.AutoModelForCausalLM


def check_rank(r: int, model) -> None:
    """ValueError if an adapter of rank r is wider than the model."""
    if r > (width := model.config.get_text_config().hidden_size):
        raise ValueError(f"--r {r}: more than the model's width {width}, which a rank cannot pass")


def commit_of(model) -> str:
    """The hub commit whose files were loaded; "" for a folder or a file."""
    return getattr(model.config, "_commit_hash", None) or ""


# ---- the weights -------------------------------------------------------------------------------------------

def load(name: str, *, revision: str = "", dtype: str = "auto", device: str = "auto", quantize: str = "",
         date: str = ""):
    """(model, tokenizer): on its device, in eval mode, tried on two short prompts; ValueError if not.

    name: a folder, a hub id, a .gguf file, or pocket. device: a torch device, auto, or balanced over all
    GPUs. quantize: "" or 4bit. date: the day that the template writes, YYYY-MM-DD; "" = today.
    """
    if device == "balanced" and ranks.WORLD > 1:
        raise ValueError("--device balanced spreads one replica over all GPUs: leave torchrun out")
    where, config, kind = config_of(name, revision)
    place, number = placed(device, dtype, config.dtype)
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
    logging.disable_progress_bar()                              # a bar in a log file is a hundred lines
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    quiet = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    if not is_gguf and cached_file(where, "adapter_config.json", revision=same["revision"], **quiet):
        raise refusal(name, "an adapter (adapter_config.json) lies beside its config.json, and would be "
                      "loaded with it or not as other packages are there; merge it into the weights, or "
                      "move it out")
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
    if lost := report["missing_keys"]:
        raise refusal(name, f"its files lack {len(lost)} of the weights, such as {min(lost)}; download it "
                      "again")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(f"model {name!r} does not fit on the GPUs: --device balanced has put a part of it "
                         "on the CPU or the disk, where it cannot be adapted; take a smaller one or "
                         "--quantize 4bit")
    if is_gguf:                                            # plain weights now, as whoever saves them must say
        del model.config.quantization_config
        model.hf_quantizer = None
    try_out(name, model, tok, number)
    return model, tok


@torch.no_grad()
def try_out(name: str, model, tok, dtype: torch.dtype) -> None:
    """ValueError if a padded row with a cache, that others leave, does not decode as it would alone."""
    kind, device = type(model).__name__, steer.device_of(model)
    rows = steer.encode(tok, ["Hi", "What is 1 + 1?"], ["", ""])
    most, n_tokens = max(map(max, rows)), model.get_input_embeddings().num_embeddings
    if most >= n_tokens:
        raise refusal(name, f"its tokenizer writes token {most}, the model has {n_tokens}")
    with named_errors(name, f"the architecture {kind}"):
        last = len(steer.blocks(model)) - 1
        row = torch.tensor(rows[:1], device=device)                         # [1, T]
        alone = model(input_ids=row, logits_to_keep=1).logits[0, -1].float()                # [V]
    ids, attn, position_ids = steer.left_pad([rows[1][:-1], rows[0][:-1]], most, device)    # [2, T] each
    nothing = {last: torch.zeros(model.config.get_text_config().hidden_size)}
    with (named_errors(name, f"the architecture {kind} cannot be steered and decoded in batches"),
          steer.steered(model, nothing, 1.0)):
        forward, cache = steer.cached_forward(model)
        forward(ids, attn, position_ids)
        cache.reorder_cache(torch.tensor([1], device=device))               # the longer row leaves
        token = torch.tensor([rows[0][-1:]], device=device)                 # [1, 1]
        attn = torch.cat([attn[1:], torch.ones_like(token)], 1)             # [1, T + 1]
        logits = forward(token, attn, position_ids[1:, -1:] + 1)[0, -1].float()             # [V]
    if not (alone.isfinite().all() and logits.isfinite().all()):
        is_exact = dtype == torch.float32
        hint = "its weights are broken: download it again" if is_exact else "try --dtype float32"
        raise ValueError(f"model {name!r}: its first logits are not finite in "
                         f"{str(dtype).removeprefix('torch.')}; {hint}")
    likeness = torch.cosine_similarity(alone - alone.mean(), logits - logits.mean(), dim=0)
    if not likeness > (0.999 if dtype == torch.float32 else 0.9):           # rounding flips experts in half
        raise refusal(name, f"the architecture {kind} gives a padded row with a cache other logits than "
                      f"alone (cosine {likeness:.2f}), so answers in batches would be wrong")


def left_out(model, layers: list[int]) -> str:
    """What `lora.attach` does not adapt in these blocks, in words; "" if that is nothing."""
    experts = sorted({name for i in layers for name, p in steer.blocks(model)[i].named_parameters()
                      if ".experts." in f".{name}" and p.dim() == 3})
    note = f"not adapted: the experts ({', '.join(experts)}), which are 3-D parameters and not Linear"
    return note if experts else ""


def fingerprint(model) -> str:
    """A checksum of the base's weights, from each tensor's name and sum: arms that compare have the same."""
    def total(p):                                               # mps has no doubles
        return p.detach().sum(dtype=torch.float32 if p.device.type == "mps" else torch.float64).item()
    sums = "".join(f"{name} {total(p):.9e}\n" for name, p in model.named_parameters())
    return f"{zlib.crc32(sums.encode()):08x}"
