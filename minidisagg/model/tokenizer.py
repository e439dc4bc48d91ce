"""Text to tokens and back: the tokenizer, its incremental form for streams, stop strings, the chat template.

Decoding is done on bytes: each token is a few bytes, a text is their concatenation read as UTF-8. So a stream can be
decoded token by token in constant time each, and what it emits adds up to the decoding of the whole, by construction.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from minidisagg.model.chat_template import ChatTemplate
from minidisagg.model.dummy import PREFIX
from minidisagg.model.loader import load_config, resolve
from minidisagg.model.tokenizer_files import read_tokenizer

DUMMY_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_TEMPLATE_ERRORS = (  # what a template's code can raise, or Python on compiling it
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, SyntaxError,
    RecursionError,
)  # fmt: skip
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's tokenizer. Build it with `load`; it is safe to use from several threads."""

    def __init__(
        self,
        rust: RustTokenizer,
        *,
        eos_token_ids: tuple[int, ...],
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        decoder: Mapping[str, Any],
        modulus: int | None = None,
    ) -> None:
        """`special_tokens` maps "eos_token" and the like to text; `decoder` is that part of tokenizer.json.

        With `modulus`, ids are taken modulo it (a dummy model has more ids than there are bytes).
        """
        self._rust = rust
        self._modulus = modulus
        self._pieces: dict[int, bytes] = {}  # filled as tokens are met: a vocabulary has 150,000
        self._byte_level, self._byte_fallback, self.strips_first_space = _read_decoder(decoder)
        self._special_ids = {i for i, token in rust.get_added_tokens_decoder().items() if token.special}
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        own_eos = rust.token_to_id(special_tokens.get("eos_token", ""))
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if own_eos is None else [own_eos])]))

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """The tokenizer of a directory, a pulled name or `dummy:SHAPE`; ValueError where it is missing or broken."""
        config = load_config(model)
        if model.startswith(PREFIX):
            return _byte_tokenizer()
        directory = resolve(model)
        files = read_tokenizer(directory, config.architecture)
        try:
            return cls(
                files.rust,
                eos_token_ids=config.eos_token_ids,
                special_tokens=files.special_tokens,
                chat_template=files.chat_template,
                decoder=files.decoder,
            )
        except ValueError as error:
            raise ValueError(f"{directory / 'tokenizer.json'}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included; a model's logits may be padded beyond it."""
        return self._rust.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token(self) -> str | None:
        """The end-of-sequence token as text."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token(self) -> str | None:
        """The beginning-of-sequence token as text."""
        return self.special_tokens.get("bos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; ValueError where it is no valid Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: {_one_line(error)}") from error
        return self._rust.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; unknown ids give nothing, invalid UTF-8 gives U+FFFD."""
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens)
        return "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()

    def piece(self, token: int, skip_special_tokens: bool) -> bytes:
        """The bytes that `token` stands for; empty for an unknown id and for a special token that is to be skipped."""
        if self._modulus is not None:
            token %= self._modulus
        if skip_special_tokens and token in self._special_ids:
            return b""
        if (piece := self._pieces.get(token)) is None:
            text = self._rust.id_to_token(token) if 0 <= token < 1 << 32 else None
            if text is None:
                return b""  # not remembered: clients may send any id
            piece = self._pieces[token] = self._make_piece(text)
        return piece

    def _make_piece(self, text: str) -> bytes:
        if self._byte_level:
            alphabet = _byte_alphabet()
            if all(char in alphabet for char in text):
                return bytes(alphabet[char] for char in text)
            return text.encode()  # an added token is plain text
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return text.replace("\u2581", " ").encode()

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, by the model's own template, in a sandbox.

        ValueError where the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use completions instead")
        try:
            return self._template.render(messages, add_generation_prompt, self.special_tokens)
        except _TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template refused the messages: {_one_line(error)}") from error

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.chat_template or "")


class IncrementalDetokenizer:
    """Decodes a stream of tokens: what `push` and `flush` return adds up to `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_first_space

    def push(self, token: int) -> str:
        """Text that is final with this token; empty while a character's bytes are incomplete."""
        return self._final(self._utf8.decode(self._tokenizer.piece(token, self._skip)))

    def flush(self) -> str:
        """The rest at the end of the stream: U+FFFD where it broke off inside a character."""
        return self._final(self._utf8.decode(b"", final=True))

    def _final(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


# ---------------------------------------------------------------- files


def _read_decoder(decoder: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """(byte level, byte fallback, strips the first space) of a tokenizer.json's decoder; ValueError for other kinds."""
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False, False
    if kinds == ["Metaspace"] and decoder.get("replacement") == "\u2581":
        return False, False, decoder.get("prepend_scheme", "always") != "never"
    plain: dict[str | None, dict[str, Any]] = {
        "Replace": {"pattern": {"String": "\u2581"}, "content": " "},
        "ByteFallback": {},
        "Fuse": {},
        "Strip": {"content": " ", "start": 1, "stop": 0},
    }
    if all(kind in plain and step == {"type": kind, **plain[kind]} for kind, step in zip(kinds, steps, strict=True)):
        return False, "ByteFallback" in kinds, "Strip" in kinds
    raise ValueError(f"decoder {kinds} is not supported; supported are ByteLevel, Metaspace and ByteFallback")


def _byte_tokenizer() -> Tokenizer:
    """One token for each byte: text commands work on a model that has no vocabulary."""
    vocab = {char: byte for char, byte in _byte_alphabet().items()}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    return Tokenizer(
        rust,
        eos_token_ids=(),
        special_tokens={},
        chat_template=DUMMY_TEMPLATE,
        decoder={"type": "ByteLevel"},
        modulus=256,
    )


_ALPHABET: dict[str, int] = {}


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): itself if it prints, else 256 + n."""
    if not _ALPHABET:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        _ALPHABET.update({chr(byte): byte for byte in printable})
        _ALPHABET.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return _ALPHABET


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
