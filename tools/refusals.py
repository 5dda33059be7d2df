"""Refusals: whatever a library raises about a checkpoint, as one sentence that says what to do."""
import contextlib

from tools.files import inert

# a sign in the names or words of the exceptions: the sentence
SENTENCES = {
    "GatedRepoError": "it is gated: accept its licence at https://huggingface.co/{name}, then log in with "
                      "`hf auth login` or set HF_TOKEN",
    "RevisionNotFoundError": "the hub has no --revision {revision!r} of it",
    "RepositoryNotFoundError": "the hub has no model of this name, or it is private (then set HF_TOKEN)",
    "couldn't connect": "it is not in the local cache and the hub cannot be reached (no network, or "
                        "HF_HUB_OFFLINE is set); a local folder works without",
    "custom code": "it needs code of its own (trust_remote_code), which is never run here; take a model that "
                   "transformers itself knows, such as Qwen/Qwen3-4B-Instruct-2507",
    "does not recognize this architecture": "this version of transformers does not know its architecture; "
                                            "pip install -U transformers",
    "model.safetensors": "it has no safetensors weights, and pickle (pytorch_model.bin) is never loaded; "
                         "take a revision or a copy of it that has model.safetensors",
    "SafetensorError": "a weights file is damaged ({text}); download it again",
    "size mismatch": "its weights do not have the shapes that its config.json says",
    "ignore_mismatched_sizes": "its weights do not have the shapes that its config.json says",
    "OutOfMemoryError": "it does not fit on {device}; take a smaller one, --dtype bfloat16, --quantize 4bit "
                        "or --device balanced",
}


def refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"model {name!r} cannot be used: {reason}")


@contextlib.contextmanager
def named_errors(name: str, what: str = "", *, revision: str = "", device: str = ""):
    """Any error inside becomes a ValueError of one sentence; what: the file that was read.

    Every Exception: a damaged file comes out of transformers, tokenizers or jinja2 as whatever it made of it.
    """
    try:
        yield
    except Exception as error:
        kinds, cause = "", error
        while cause:
            kinds, cause = f"{kinds} {type(cause).__name__}", cause.__cause__
        text = inert(str(error).strip().split("\n")[0])[:300] or type(error).__name__
        is_plain = isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
        other = (f"{what}: " if what else "") + ("" if is_plain else f"{type(error).__name__}, ") + "{text}"
        reason = next((reason for sign, reason in SENTENCES.items() if sign in f"{kinds} {error}"), other)
        raise refusal(name, reason.format(name=name, revision=revision, device=device, text=text)) from None
