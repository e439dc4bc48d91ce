"""What a HF directory says about its tokenizer: tokenizer.json, and what the files beside it add to that.

Everything is read as transformers (5) does, so that a text becomes the tokens that it becomes there. Notably:
truncation and padding saved in tokenizer.json are settings of whoever saved it and are dropped; tokens may be declared
outside of tokenizer.json; `add_bos_token` and `add_eos_token` say nothing where there is a tokenizer.json;
LlamaTokenizer takes no more than vocabulary, merges, post-processor and added tokens from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from minidisagg.model.loader import read_json

# Special tokens that a class of transformers has where no file names others.
CLASS_ROLES = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
}
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFiles(NamedTuple):
    """What is read of a directory."""

    rust: RustTokenizer
    decoder: Mapping[str, Any]  # that part of tokenizer.json
    special_tokens: dict[str, str]  # texts by role, as "eos_token"
    chat_template: str | None


def read_tokenizer(directory: Path, architecture: str) -> TokenizerFiles:
    """The tokenizer of a model directory. ValueError with one line that names the file that is missing or broken.

    Of some models transformers takes only the vocabulary from tokenizer.json, and that depends on `architecture`.
    """
    path, settings_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; download it from where the model came from")
    raw, settings = read_json(path), _optional_json(settings_path)
    older = [_optional_json(directory / name) for name in ("special_tokens_map.json", "added_tokens.json")]
    try:
        rust = RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no valid tokenizer ({_one_line(error)}); download it again") from error
    rust.no_truncation()
    rust.no_padding()
    try:
        rust.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        _refuse_clean_up(settings, rust)
        kind = _tokenizer_class(raw, settings, architecture)
        decoder = raw.get("decoder") or {}
        if kind == "LlamaTokenizer":
            decoder = _make_llama(rust, raw["model"], settings)
        padding = raw.get("padding") or {}
        presets = {**CLASS_ROLES.get(kind, {}), **({"pad_token": padding["pad_token"]} if padding else {})}
        special = _add_tokens(rust, raw, [presets, settings], *older)
        return TokenizerFiles(rust, decoder, special, _read_chat_template(settings, directory))
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"{settings_path} or a file beside it is wrong: {_one_line(error)}") from error


def _tokenizer_class(raw: Mapping[str, Any], settings: Mapping[str, Any], architecture: str) -> str:
    """The class that transformers loads it with, as far as it matters; "" for the one that obeys tokenizer.json."""
    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if architecture == "Qwen2ForCausalLM" or (architecture == "Qwen3ForCausalLM" and not named):
        return "Qwen2Tokenizer"
    if architecture == "MistralForCausalLM" or (named == "LlamaTokenizer" and '"ByteLevel"' in json.dumps(raw)):
        return ""
    return named


def _make_llama(rust: RustTokenizer, model: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give `rust` the pipeline that LlamaTokenizer has whatever tokenizer.json says; returns its decoder.

    What differs is where a space is put in front: before each piece of text between special tokens (`legacy`), before
    the first one, or nowhere, and what becomes of spaces that are there.
    """
    if not isinstance(rust.model, models.BPE):
        raise ValueError(f"LlamaTokenizer with a {type(rust.model).__name__} model is not supported, only with BPE")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    rust.model = models.BPE(vocab=model["vocab"], merges=merges, fuse_unk=True, byte_fallback=True)
    has_prefix = settings.get("add_prefix_space") in (None, True)
    scheme = "never" if not has_prefix else "always" if settings.get("legacy") else "first"
    rust.normalizer = None
    rust.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]  # fmt: skip
    if has_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _refuse_clean_up(settings: Mapping[str, Any], rust: RustTokenizer) -> None:
    """Decoding that edits its text afterwards cannot be streamed. With BPE transformers does not do it either."""
    of_bpe = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if settings.get("clean_up_tokenization_spaces") and (of_bpe or not isinstance(rust.model, models.BPE)):
        raise ValueError("clean_up_tokenization_spaces is not supported; set it to false")


# ---------------------------------------------------------------- special and added tokens


def _add_tokens(
    rust: RustTokenizer,
    raw: Mapping[str, Any],
    sources: list[Mapping[str, Any]],
    special_tokens_map: Mapping[str, Any],
    added_tokens: Mapping[str, Any],
) -> dict[str, str]:
    """Teach `rust` the tokens that are declared outside of tokenizer.json; returns the special ones by role.

    With `added_tokens_decoder` (transformers 4.34 and later) tokenizer_config.json, the last of `sources`, is complete,
    and the two older files are not read. A declared id does not count: new tokens get the next ids, in the order of the
    declared ones.
    """
    settings = sources[-1]
    complete = "added_tokens_decoder" in settings
    named, extra = _special_tokens(sources if complete else [*sources, special_tokens_map])
    if complete:
        declared = {int(token_id): _token(value) for token_id, value in settings["added_tokens_decoder"].items()}
        known = {repr(token) for token in rust.get_added_tokens_decoder().values()}
        declared = {token_id: token for token_id, token in declared.items() if repr(token) not in known}
    else:
        special = {token.content for token in [*named.values(), *extra]}
        taken = {token["id"] for token in raw.get("added_tokens", [])}
        declared = {
            token_id: AddedToken(content, normalized=content not in special, special=content in special)
            for content, token_id in added_tokens.items()
            if token_id not in taken
        }
    roles = {token.content for token in named.values()}
    new = [declared[token_id] for token_id in sorted(declared)]
    for token in [*new, *named.values()]:
        token.special = token.special or token.content in roles
    present = {token.content for token in [*rust.get_added_tokens_decoder().values(), *new]}
    for token in [*named.values(), *extra]:
        if token.content not in present:
            present.add(token.content)
            new.append(token)
    if new:
        rust.add_tokens(new)
    return {role: token.content for role, token in named.items()}


def _special_tokens(sources: Iterable[Mapping[str, Any]]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """(tokens by role, tokens without one), a later source overriding an earlier one.

    Any key of the form *_token that holds a token is a role, and so is each key of an `extra_special_tokens` object.
    As a list, under that name or its older one `additional_special_tokens`, they have none.
    """
    named: dict[str, AddedToken] = {}
    extra: dict[str, AddedToken] = {}
    for source in sources:
        roles = {key: value for key, value in source.items() if key.endswith("_token") and _is_token(value)}
        more = source.get("extra_special_tokens") or []
        if isinstance(more, dict):
            roles |= more
            more = []
        more = more or source.get("additional_special_tokens") or []
        extra |= {token.content: token for token in map(_special, more)}
        for role in ROLES:
            if role in source and source[role] is None:
                named.pop(role, None)
        named |= {role: _special(value) for role, value in roles.items()}
    ordered = sorted(named, key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))
    return {role: named[role] for role in ordered}, list(extra.values())


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _token(value: Any) -> AddedToken:
    """A token from its text, or from a serialized AddedToken."""
    if not _is_token(value):
        raise ValueError(f"{value!r} is no token")
    if isinstance(value, str):
        return AddedToken(value)
    return AddedToken(**{key: item for key, item in value.items() if key != "__type"})


def _special(value: Any) -> AddedToken:
    """The same, special unless it says otherwise."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return _token({"special": True, **value} if isinstance(value, dict) else value)


# ---------------------------------------------------------------- chat templates


def _read_chat_template(settings: Mapping[str, Any], directory: Path) -> str | None:
    """The one for plain conversations: of several, the one named default. Files override tokenizer_config.json."""
    named = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (file := directory / "chat_template.jinja").is_file():
        named.setdefault("default", file)
    if named:
        default = named.get("default")
        return None if default is None else default.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template must be text or a list of named texts, not {template!r}")
    return template


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
