"""Odd but legal model directories mean what they mean in transformers, or are refused in one line.

The tables below are directories, each by what differs from a plain one: a file's name and its text, or the keys of its
JSON. Adding a case is one line. The directories are made here, tiny and random, and transformers is asked about them.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from minidisagg.core.plan import PlanItem
from minidisagg.model.attention import build_batch
from minidisagg.model.dummy import parameter_shapes
from minidisagg.model.loader import ARCHITECTURES, DEFAULTS, NEUTRAL, load_config, load_weights
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.model.transformer import Transformer
from minidisagg.runtime.kv_cache import KVCache
from minidisagg.server.protocol import ChatRequestMessage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers deprecates inside itself says nothing about this project
    import transformers

CPU = torch.device("cpu")
ABSENT = object()
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}
NO_ROLES = {"bos_token": ABSENT, "eos_token": ABSENT}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, and transformers' opinions on odd directories unheard."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def write(directory: Path, files: dict[str, Any], changes: dict[str, Any]) -> str:
    """`files` with `changes`: of JSON objects key by key, where ABSENT removes one; of others the whole."""
    for name, content in {**files, **changes}.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif content is not ABSENT:
            merged = {**files.get(name, {}), **content}
            path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ABSENT}))
    return str(directory)


def refused(error: pytest.ExceptionInfo[ValueError], says: str) -> None:
    assert says in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- tokenizers and chat templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say \"hi\" & <bye>, 'é', 😀", "name": "ann"},
    {"role": "assistant", "content": "  hi\n"},
]
PARTS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
]
TEXT = "one two <|im_start|>hi<|im_end|> <|turn|> <|a|><|b|> café <|new|>."
LOOP = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }};{% endfor %}{% endif %}{% endfor %}"
)


def byte_tokenizer() -> dict[str, Any]:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    raw: dict[str, Any] = json.loads(rust.to_str())
    return raw


def sentencepiece_tokenizer() -> dict[str, Any]:
    """As Llama 2 has it: "▁" for a space, put in front of each piece of text, and tokens for single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "o", "n", "h", "i", "on", "▁on"]
    pieces += ["▁▁", "hi", "▁hi"]
    merges = [("o", "n"), ("▁", "on"), ("▁", "▁"), ("h", "i"), ("▁", "hi")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(space)
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw: dict[str, Any] = json.loads(rust.to_str())
    return raw


def added(content: str, **changes: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **flags, **changes}


def named(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **added(content)}


def template(text: str, **settings: Any) -> dict[str, Any]:
    return {"chat_template.jinja": text, "tokenizer_config.json": {"chat_template": ABSENT, **settings}}


def settings(**changes: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": changes}


def sentencepiece(model_type: str = "llama", **settings: Any) -> dict[str, Any]:
    architectures = [name for name, known in ARCHITECTURES.items() if known == model_type]
    template = "{{ bos_token }}{{ unk_token }}{% for m in messages %} {{ m.content }}{{ eos_token }}  hi\n{% endfor %}"
    return {
        "tokenizer.json": SENTENCEPIECE,
        "tokenizer_config.json": {"chat_template": template, **NO_ROLES, **settings},
        "config.json": {"model_type": model_type, "architectures": architectures},
    }


BYTES, SENTENCEPIECE = byte_tokenizer(), sentencepiece_tokenizer()
PLAIN: dict[str, Any] = {
    "config.json": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    },
    "tokenizer.json": BYTES,
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    },
}  # fmt: skip
ROLES = (
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ sep_token }}|{{ pad_token }}|{{ cls_token }}|{{ mask_token }}"
)
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 200}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 257, "pad_type_id": 0,
    "pad_token": "<|im_end|>",
}  # fmt: skip
ADDS_BOS = {
    "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [256], "tokens": ["<|im_start|>"]}},
}  # fmt: skip
TURN = "{% for m in messages %}{{ turn_token }}{{ m.role }}: {{ m.content }}{% endfor %}"
MAP = "special_tokens_map.json"
OLD_ADDED = {key: value for key, value in added("<|a|>").items() if key != "special"}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no tokenizer_config": {"tokenizer_config.json": ABSENT, "chat_template.jinja": CHATML},
    # what was set when tokenizer.json was saved
    "truncation": {"tokenizer.json": {"truncation": TRUNCATION}},
    "truncation on the left": {"tokenizer.json": {"truncation": {**TRUNCATION, "direction": "Left", "stride": 2}}},
    "padding": {"tokenizer.json": {"padding": PADDING}},
    "padding to a multiple": {
        "tokenizer.json": {"padding": {**PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 64}}
    },
    "truncation and padding": {"tokenizer.json": {"truncation": TRUNCATION, "padding": PADDING}},
    "model_max_length": settings(model_max_length=8, truncation_side="left", padding_side="left"),
    # tokens outside of tokenizer.json
    "added_tokens_decoder": settings(added_tokens_decoder={"258": added("<|turn|>")}),
    "added_tokens_decoder, not in order, with gaps": settings(
        added_tokens_decoder={"290": added("<|a|>"), "270": added("<|b|>"), "9": added("<|turn|>", special=False)}
    ),
    "added_tokens_decoder, other flags": settings(
        added_tokens_decoder={"256": added("<|im_start|>", rstrip=True), "257": added("<|im_end|>", lstrip=True)}
    ),
    "added_tokens_decoder, normalized": settings(added_tokens_decoder={"258": added("<|a|>", normalized=True)}),
    "added_tokens_decoder, single word": settings(added_tokens_decoder={"258": added("hi", single_word=True)}),
    "added_tokens_decoder, of the vocabulary": settings(added_tokens_decoder={"65": added("a")}),
    "added_tokens_decoder, not special but a role": settings(
        added_tokens_decoder={"258": added("<|a|>", special=False)}, eos_token="<|a|>"
    ),
    "added_tokens_decoder, empty": {**settings(added_tokens_decoder={}), MAP: {"bos_token": "<|new|>"}},
    "added_tokens_decoder makes the map void": {
        **settings(added_tokens_decoder={"258": added("<|a|>")}), MAP: {"bos_token": "<|new|>"},
        "added_tokens.json": {"<|b|>": 259},
    },
    "special_tokens_map": {
        MAP: {"bos_token": "<|im_start|>", "eos_token": added("<|im_end|>")}, **template(ROLES, **NO_ROLES)
    },
    "special_tokens_map overrides": {MAP: {"bos_token": "<|im_end|>", "pad_token": "<|new|>"}, **template(ROLES)},
    "special_tokens_map, additional": {MAP: {"additional_special_tokens": ["<|a|>", "<|b|>"]}},
    "special_tokens_map, extra": {MAP: {"extra_special_tokens": ["<|b|>", OLD_ADDED]}},
    "special_tokens_map, extra by name": {MAP: {"extra_special_tokens": {"turn_token": "<|turn|>"}}, **template(TURN)},
    "special_tokens_map, other roles": {MAP: {"turn_token": "<|turn|>"}, **template(TURN)},
    "added_tokens.json": {"added_tokens.json": {"<|b|>": 259, "<|a|>": 258}},
    "added_tokens.json, special": {
        "added_tokens.json": {"<|b|>": 259, "<|a|>": 258, "<|turn|>": 260},
        **settings(eos_token="<|a|>", additional_special_tokens=["<|b|>"]),
    },
    "added_tokens.json, ids that are taken": {"added_tokens.json": {"<|a|>": 256, "<|im_end|>": 257}},
    "extra_special_tokens by name": template(TURN, extra_special_tokens={"turn_token": "<|turn|>"}),
    "extra_special_tokens as AddedToken": template(TURN, extra_special_tokens={"turn_token": named("<|turn|>")}),
    "extra_special_tokens as a list": settings(extra_special_tokens=["<|turn|>", named("<|a|>")]),
    "additional_special_tokens": settings(additional_special_tokens=["<|turn|>", "<|im_end|>", "<|a|>"]),
    "additional_special_tokens beside others": template(
        TURN, extra_special_tokens={"turn_token": "<|turn|>"}, additional_special_tokens=["<|a|>"]
    ),
    "a role of the model's own": template(TURN, turn_token="<|turn|>"),
    "roles as AddedToken": template(ROLES, bos_token=named("<|a|>"), eos_token=named("<|im_end|>")),
    "all roles": template(ROLES, unk_token="<|a|>", sep_token="<|b|>", cls_token="<|turn|>", mask_token="<|new|>"),
    "roles in no vocabulary, in another order": template(
        ROLES, extra_special_tokens={"x_token": "<|turn|>"}, mask_token="<|a|>", sep_token="<|b|>", bos_token="<|new|>"
    ),
    "extra_special_tokens that are not special": settings(extra_special_tokens=[{**named("<|a|>"), "special": False}]),
    "a role that is not special": settings(pad_token={**named("<|a|>"), "special": False}),
    "no bos": template(ROLES, bos_token=None),
    "a role in no vocabulary": template(ROLES, bos_token="<|new|>"),
    "add_bos_token": settings(add_bos_token=True, add_eos_token=True),
    "add_bos_token false, bos added": {
        "tokenizer.json": {"post_processor": ADDS_BOS}, **settings(add_bos_token=False)
    },
    "bos added": {"tokenizer.json": {"post_processor": ADDS_BOS}},
    "split_special_tokens": settings(split_special_tokens=True),
    "clean_up_tokenization_spaces": settings(clean_up_tokenization_spaces=True),
    # classes that say more than the files
    "sentencepiece": sentencepiece(bos_token="<s>", eos_token="</s>"),
    "LlamaTokenizer": sentencepiece(tokenizer_class="LlamaTokenizer"),
    "LlamaTokenizerFast": sentencepiece(tokenizer_class="LlamaTokenizerFast", bos_token="</s>", unk_token=None),
    "LlamaTokenizer, legacy": sentencepiece(tokenizer_class="LlamaTokenizer", legacy=True),
    "LlamaTokenizer, no prefix": sentencepiece(tokenizer_class="LlamaTokenizer", add_prefix_space=False),
    "LlamaTokenizer of Qwen3": sentencepiece("qwen3", tokenizer_class="LlamaTokenizer"),
    "LlamaTokenizer of Mistral": sentencepiece("mistral", tokenizer_class="LlamaTokenizer", bos_token="<s>"),
    "LlamaTokenizer of bytes": settings(tokenizer_class="LlamaTokenizer"),
    "Qwen2": {"config.json": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, **template(ROLES)},
    "Qwen3": {"config.json": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, **template(ROLES)},
    "Qwen3 without a class": {
        "config.json": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        **template(ROLES, tokenizer_class=ABSENT),
    },
    "GPT2Tokenizer": template(ROLES, tokenizer_class="GPT2Tokenizer", bos_token=ABSENT),
    # where the template is
    "named templates": settings(
        chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    ),
    "a template file": {"chat_template.jinja": "file {{ messages[0].content }}"},
    "a template file, and others": {
        "chat_template.jinja": "file {{ messages[0].content }}", "additional_chat_templates/rag.jinja": "x"
    },
    "others, one is the default": {"additional_chat_templates/default.jinja": "other {{ messages[0].content }}"},
    # what it may do
    "generation tag": template(
        "{% set n = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set n = 2 %}"
        "{{ m.content }}{{ n }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ n }}\n{% endfor %}"
    ),
    "generation tag with dashes": template(
        "{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration -%}{% endfor %}"
    ),
    "tojson": template("{{ messages | tojson }}{{ messages[1].content | tojson }}"),
    "tojson ensure_ascii": template("{{ messages | tojson(ensure_ascii=True) }}{{ messages | tojson(true) }}"),
    "tojson separators, sort_keys": template("{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}"),
    "tojson indent": template("{{ messages | tojson(indent=2) }}{{ messages | tojson(indent=1, sort_keys=true) }}"),
    "loop controls": template(
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}"
    ),
    "lines with blocks": template("{% for m in messages %}\n  {% if loop.first %}\n  x\n  {% endif %}\n{% endfor %}\n"),
    "strftime_now": template("{{ strftime_now('%Y') }}{{ strftime_now(format='%m') }}"),
    "namespace, dict, macro": template(
        "{% macro f(m) %}{{ m.role | upper }}{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{{ f(m) }}{{ ns.n }}{{ dict(a=ns.n) }}{% endfor %}"
    ),
    "no tools, no documents": template("{{ tools is none }}{{ documents is none }}{{ xyz is defined }}{{ xyz }}"),
    "names": template("{% for m in messages %}{{ m.name if m.name is defined else 'none' }}{% endfor %}"),
    "words": template("{% for m in messages %}{% for w in m.content.split(' ') %}{{ w }}|{% endfor %}{% endfor %}"),
}  # fmt: skip
CONTENT_FORMS = {  # template → whether it takes texts, parts
    "text": ("{% for m in messages %}{{ m.content }};{% endfor %}", True, False),
    "trimmed": ("{% for m in messages %}{{ m['content'] | trim }};{% endfor %}", True, False),
    "words": ("{% for m in messages %}{% for w in m.content.split() %}{{ w }};{% endfor %}{% endfor %}", True, False),
    "loop": (LOOP, False, True),
    "item": (LOOP.replace("m.content", "m['content']").replace("p.text", "p['text']"), False, True),
    "filtered": (LOOP.replace("m.content", "m.content | selectattr('type', 'equalto', 'text')"), False, True),
    "slice": (LOOP.replace("m.content", "m.content[:1]"), False, True),
    "set": (LOOP.replace("{% for p in m.content", "{% set c = m.content %}{% set d = c %}{% for p in d"), False, True),
    "macro": (
        "{% macro f(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ f(m.content) }};{% endfor %}", False, True,
    ),
    "macro by name": (
        "{% macro f(x, c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ f(1, c=m['content']) }};{% endfor %}", False, True,
    ),
    "map": ("{% for m in messages %}{{ m.content | map(attribute='text') | join(';') }}{% endfor %}", False, True),
    "index": ("{% for m in messages %}{{ m.content[0].text }}{{ m['content'][0]['text'] }}{% endfor %}", False, True),
    "initial": ("{% for m in messages %}{{ m.content[0] }}{% endfor %}", True, False),
    "either": (EITHER, True, True),
    "generation": (LOOP.replace("{{ p.text }}", "{% generation %}{{ p.text }}{% endgeneration %}"), False, True),
}  # fmt: skip


def their_tokenizer(model: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_and_chat_template(name: str, tmp_path: Path) -> None:
    model = write(tmp_path, PLAIN, TOKENIZERS[name])
    theirs, ours = their_tokenizer(model), Tokenizer.load(model)
    assert ours.special_tokens == theirs.special_tokens_map
    texts = [TEXT, "", "  on hi", "hi</s>hi<s> on", *(message["content"] for message in MESSAGES)]
    for add_special_tokens in (True, False):
        for text in texts:
            ids = theirs(text, add_special_tokens=add_special_tokens)["input_ids"]
            assert ours.encode(text, add_special_tokens) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        generate = add_special_tokens
        prompt = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generate)
        assert ours.apply_chat_template(MESSAGES, generate) == prompt
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=generate)["input_ids"]
        assert ours.encode(prompt, add_special_tokens=False) == ids


@pytest.mark.parametrize("name", CONTENT_FORMS)
def test_a_template_gets_content_as_it_takes_it(name: str, tmp_path: Path) -> None:
    """As the client sent it where the template takes that, so that nothing is between the two; else converted."""
    text, takes_texts, takes_parts = CONTENT_FORMS[name]
    model = write(tmp_path, PLAIN, template(text))
    theirs, ours = their_tokenizer(model), Tokenizer.load(model)
    joined = [{**m, "content": "\n".join(part["text"] for part in m["content"])} for m in PARTS]
    wrapped = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    for sent, taken in ((PARTS, PARTS if takes_parts else joined), (MESSAGES, MESSAGES if takes_texts else wrapped)):
        said = ours.apply_chat_template(sent)
        assert said == theirs.apply_chat_template(taken, tokenize=False, add_generation_prompt=True)
        assert "one" in said or "Be" in said or name == "initial"


def test_the_server_hands_on_what_was_sent() -> None:
    sent = [*PARTS, MESSAGES[1], {"role": "developer", "content": "x"}, {"role": "assistant", "content": None}]
    expected = [*PARTS, MESSAGES[1], {"role": "system", "content": "x"}, {"role": "assistant", "content": ""}]
    assert [message.as_dict() for message in msgspec.convert(sent, list[ChatRequestMessage])] == expected


@pytest.mark.parametrize(
    "changes, says",
    [
        (settings(added_tokens_decoder={"258": 3}), "3 is no token"),
        (settings(added_tokens_decoder={"x": added("<|a|>")}), "invalid literal"),
        (settings(extra_special_tokens=[7]), "7 is no token"),
        (settings(chat_template=7), "chat_template must be text"),
        (settings(chat_template=[{"name": "default"}]), "template"),
        ({MAP: {"extra_special_tokens": {"turn_token": []}}}, "[] is no token"),
        ({"tokenizer.json": {"model": UNIGRAM}, **settings(clean_up_tokenization_spaces=True)}, "clean_up"),
        (
            {"tokenizer.json": {"model": UNIGRAM, "pre_tokenizer": None, "decoder": None}}
            | settings(tokenizer_class="LlamaTokenizer"),
            "LlamaTokenizer with a Unigram model",
        ),
        (
            settings(
                clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
                clean_up_tokenization_spaces=True,
            ),
            "clean_up_tokenization_spaces is not supported",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_beside_a_tokenizer_is_said(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        Tokenizer.load(write(tmp_path, PLAIN, changes))
    refused(error, says)


@pytest.mark.parametrize(
    "changes", [{"additional_chat_templates/rag.jinja": "x"}, settings(chat_template=[]), settings(chat_template=None)]
)
def test_a_model_without_a_default_template_says_so(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        Tokenizer.load(write(tmp_path, PLAIN, changes)).apply_chat_template(MESSAGES)
    refused(error, "no chat template")


# ---------------------------------------------------------------- configurations

VOCAB, PAGE = 96, 16
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "dtype": "float32",
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
MIXED = ["full_attention", "sliding_attention"]
HEAD = torch.arange(VOCAB * 32).view(VOCAB, 32).sin()
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in ARCHITECTURES.values()),
    # the dtype's names
    ("llama", {"dtype": ABSENT, "torch_dtype": "float32"}),
    ("llama", {"architectures": None}),
    # rope in all spellings, and which one wins
    ("llama", {"rope_theta": 500.0}),
    ("llama", {"rope_theta": 500.0, "rope_scaling": None}),
    ("llama", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3, "rope_theta": 900.0}}),
    ("llama", {"rope_parameters": DEFAULT_ROPE}),
    ("llama", {"rope_parameters": DEFAULT_ROPE, "rope_theta": 9.0}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    ("llama", {"rope_parameters": DEFAULT_ROPE, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("qwen3", {"rope_parameters": DEFAULT_ROPE, "rope_theta": 70.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", **LLAMA3}, "rope_scaling": DEFAULT_ROPE}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 40}),
    ("llama", {"rope_scaling": {k: v for k, v in {"type": "llama3", **LLAMA3}.items() if "original" not in k}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("mistral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    ("llama", {"rope_scaling": {"type": "default", "factor": 4.0}}),
    # windows
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": 1}),
    ("mistral", {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 2}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 8, "layer_types": MIXED, "head_dim": 8, "rope_theta": 500.0}),
    ("mistral", {"sliding_window": 8, "layer_types": MIXED[:1] * 2, "head_dim": 8, "rope_theta": 500.0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": MIXED[::-1]}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": MIXED}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 400, "layer_types": MIXED}),
    ("qwen3", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ("llama", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    # heads and sizes that are not given
    ("qwen3", {"head_dim": 16}),
    ("llama", {"head_dim": 16, "num_key_value_heads": None}),
    ("llama", {"head_dim": None, "num_key_value_heads": ABSENT}),
    ("mistral", {"num_attention_heads": 8, "num_key_value_heads": ABSENT}),
    ("qwen2", {"num_key_value_heads": None}),
    ("qwen2", {"head_dim": 16}),
    ("llama", {"rms_norm_eps": 0.1}),
    # the output head
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True, "lm_head": HEAD}),
    # keys that its class does not read, or that say what is so anyway
    ("qwen2", {"attention_bias": True}),
    ("llama", {"hidden_act": "swish", "mlp_bias": False, "attention_bias": False, "pretraining_tp": 2}),
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "use_cache": False, "transformers.js_config": {}}),
    ("qwen2", {"use_mrope": False, "attention_dropout": 0.5, "initializer_range": 9.0, "_name_or_path": "x"}),
]  # fmt: skip


def write_model(directory: Path, model_type: str, changes: dict[str, Any]) -> str:
    """A directory with random weights; norms and biases are random too, so that leaving one out shows."""
    architectures = [name for name, known in ARCHITECTURES.items() if known == model_type]
    config = {"architectures": architectures, "model_type": model_type, **SHAPE}
    path = write(directory, {"config.json": config}, {"config.json": {**changes, "lm_head": ABSENT}})
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.3 * torch.randn(shape, generator=generator) + ("norm" in name)
        for name, shape in parameter_shapes(load_config(path)).items()
    }
    if "lm_head" in changes:
        weights["lm_head.weight"] = changes["lm_head"]
    save_file(weights, directory / "model.safetensors")
    return path


@pytest.mark.parametrize("model_type, changes", CONFIGS)
def test_logits(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """After a prompt at once, after the same in chunks, and after each token of a greedy continuation."""
    path = write_model(tmp_path, model_type, changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    config = load_config(path)
    ours = Transformer(config, load_weights(path, config), torch.float32, CPU)
    ids = [random.Random(3).randrange(VOCAB) for _ in range(40)]
    cache = KVCache(config, 8, PAGE, torch.float32, CPU)
    cache.data.normal_()  # what a page held before must not matter

    def logits(start: int, end: int, pages: list[int]) -> torch.Tensor:
        item = PlanItem("r", 0, start, end - start, ids[start:end], pages, True, 0)
        batch = build_batch([item], [item.tokens], cache, torch.float32, CPU)
        return ours.logits(ours.hidden(batch, cache)[batch.sample_rows_S])[0]

    got = [logits(0, 40, [5, 2, 7, 0])]
    for start, end in ((0, 7), (7, 8), (8, 30), (30, 40)):
        last = logits(start, end, [1, 6, 3, 4])
    got.append(last)
    for _ in range(4):
        ids.append(int(got[-1].argmax()))
        got.append(logits(len(ids) - 1, len(ids), [1, 6, 3, 4]))
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids]), use_cache=False).logits[0, 39:]
    assert ids[40:] == expected[:-1].argmax(-1).tolist()
    for row, want in zip(got, [expected[0], *expected], strict=True):
        assert (row - want).norm() / want.norm() < 1e-4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gemma"}, "model_type 'gemma'"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification'"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"sliding_window": 8}, "sliding_window 8"),
    ("llama", {"layer_types": MIXED}, "layer_types has sliding_attention"),
    ("mistral", {"sliding_window": None, "layer_types": MIXED}, "layer_types has sliding_attention"),
    ("qwen3", {"sliding_window": 8, "layer_types": MIXED}, "layer_types has sliding_attention"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must be 2 of"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types must be 2 of"),
    ("qwen3", {"layer_types": 3}, "layer_types must be 2 of"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
    ("llama", {"rope_parameters": DEFAULT_ROPE, "rope_scaling": {"type": "yarn"}}, "rope type 'yarn'"),
    ("qwen3", {"rope_parameters": {"full_attention": DEFAULT_ROPE}}, "rope_parameters for each layer type"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "key 'factor' is missing"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ("llama", {"compression_config": {"format": "int-quantized"}}, "quantized"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    ("qwen3", {"head_dim": None}, "head_dim must be a positive integer, not None"),
    ("llama", {"rope_theta": None}, "rope_theta must be a positive number, not None"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, not '1e-5'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number, not 0"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers must be a whole number"),
    ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
    ("llama", {"is_causal": False}, "is_causal False"),
    *(
        ("llama", {key: 4}, f"{key} 4 is not supported")
        for key in ("num_experts", "num_local_experts", "attention_multiplier", "residual_multiplier", "logit_scale",
                    "embedding_multiplier", "logits_scaling", "query_pre_attn_scalar", "final_logit_softcapping",
                    "attn_logit_softcapping", "attention_chunk_size")
    ),
]  # fmt: skip


@pytest.mark.parametrize("model_type, changes, says", REFUSED)
def test_refusals(model_type: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    architectures = [name for name, known in ARCHITECTURES.items() if known == model_type]
    config = {"architectures": architectures, "model_type": model_type, **SHAPE}
    with pytest.raises(ValueError) as error:
        load_config(write(tmp_path, {"config.json": config}, {"config.json": changes}))
    refused(error, says)


READ = {"architectures", "bos_token_id", "dtype", "eos_token_id", "layer_types", "rope_parameters"}
MEANINGLESS = {  # here: of training, of other tasks, of what is returned how
    "attention_dropout", "chunk_size_feed_forward", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "transformers_version",
    "use_cache",
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_keys_are_known_and_absent_ones_have_the_defaults_of_transformers(
    architecture: str, tmp_path: Path
) -> None:
    """A key that a later transformers adds to a class fails here."""
    theirs = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
    known = READ | MEANINGLESS | DEFAULTS[architecture].keys() | NEUTRAL.keys()
    assert {field.name for field in fields(theirs)} <= known
    ours = load_config(write(tmp_path, {}, {"config.json": {"model_type": ARCHITECTURES[architecture]}}))
    windowed = getattr(theirs, "layer_types", None) or ["full_attention"] * theirs.num_hidden_layers
    if architecture == "MistralForCausalLM":
        windowed = ["sliding_attention"] * theirs.num_hidden_layers
    eos = theirs.eos_token_id
    assert {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads),
        "max_model_len": theirs.max_position_embeddings,
        "rms_norm_eps": theirs.rms_norm_eps,
        "tie_embeddings": theirs.tie_word_embeddings,
        "eos_token_ids": () if eos is None else (eos,),
        "windowed_layers": tuple(i for i, kind in enumerate(windowed) if kind == "sliding_attention"),
    }.items() <= vars(ours).items()
    assert (ours.rope.theta, ours.rope.factor) == (theirs.rope_parameters["rope_theta"], 1.0)


@pytest.mark.parametrize(
    "name, dtype",
    [("torch.float32", "float32"), ("torch.bfloat16", "bfloat16"), ("half", "float16"), (None, "float32")],
)
def test_names_of_dtypes(name: str | None, dtype: str, tmp_path: Path) -> None:
    config = {"model_type": "llama", **SHAPE, "dtype": name}
    assert load_config(write(tmp_path, {}, {"config.json": config})).dtype == dtype


PUBLIC: dict[str, dict[str, Any]] = {  # the keys of well-known checkpoints that might be mistaken for something
    "smollm2": {
        "model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "pretraining_tp": 1, "transformers.js_config": {"kv_cache_dtype": {}}, "mlp_bias": False,
    },
    "llama 3.2": {
        "model_type": "llama", "head_dim": 64, "rope_scaling": {**LLAMA3, "factor": 32.0, "rope_type": "llama3"},
        "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16", "attention_dropout": 0.0,
    },
    "mistral 7b": {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
    "mistral nemo": {"model_type": "mistral", "head_dim": 128, "sliding_window": None, "rope_theta": 1000000.0},
    "qwen 2.5": {
        "model_type": "qwen2", "use_mrope": False, "use_sliding_window": False, "sliding_window": 32768,
        "max_window_layers": 21, "max_position_embeddings": 131072,
    },
    "qwen 3": {
        "model_type": "qwen3", "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 28, "rope_scaling": None, "head_dim": 128,
    },
    "qwen 3, saved anew": {
        "model_type": "qwen3", "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 28, "pad_token_id": None, "transformers_version": "5.0.0",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_not_refused(name: str, tmp_path: Path) -> None:
    load_config(write(tmp_path, {}, {"config.json": PUBLIC[name]}))
