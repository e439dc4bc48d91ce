"""Decoding streams, stop strings and chat templates, on small tokenizers made here and on SmolLM2's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers

from minidisagg.model.loader import cached_path
from minidisagg.model.tokenizer import IncrementalDetokenizer, Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
TEXTS = [
    "The capital of France is",
    "Hello 😀👨‍👩‍👧‍👦 wörld 12345 3.14",
    "你好\uff0c世界\uff01日本語テスト 한국어",
    "def f(x):\n    return x**2  # ok\n\t\tif a != b: pass",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  lead  spaces  \n\n",
    "\u202eعربي हिन्दी \ufffd",
    "a\x00b\x7f",
    "",
]
# Code points that take one to four bytes, and those that join into one visible character.
TEXT = st.text(st.sampled_from("ab <|>0é߿한�😀👩\u200d🏽\u0301\n") | st.characters(exclude_categories=["Cs"]))


def sentencepiece_tokenizer() -> RustTokenizer:
    """What Llama 2 and Mistral have: "▁" for a space, tokens for single bytes, the first space dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab", "é", "\u2581\u2581"]
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581", "\u2581")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    space = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(space)
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    return rust


def write(directory: Path, rust: RustTokenizer, **tokenizer_config: Any) -> str:
    (directory / "config.json").write_text(json.dumps(CONFIG))
    rust.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return str(directory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, RustTokenizer]:
    rust = sentencepiece_tokenizer()
    directory = tmp_path_factory.mktemp("sentencepiece")
    return Tokenizer.load(write(directory, rust, eos_token={"content": "</s>"}, bos_token="<s>")), rust


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokenizer, RustTokenizer]:
    path = cached_path("smollm2-135m")
    if not (path / "config.json").is_file():
        pytest.skip("smollm2-135m is not in the cache; run: minidisagg pull smollm2-135m")
    return Tokenizer.load(str(path)), RustTokenizer.from_file(str(path / "tokenizer.json"))


DUMMY = Tokenizer.load("dummy:tiny")


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    """What each push emits, then the flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


# ---------------------------------------------------------------- encode and decode


def test_loaded_facts(sentencepiece: tuple[Tokenizer, RustTokenizer]) -> None:
    tokenizer, rust = sentencepiece
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", "<s>")
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == rust.get_vocab_size() == 267
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_eos_ids_are_those_of_all_files(tmp_path: Path) -> None:
    model = write(tmp_path, sentencepiece_tokenizer(), eos_token="<s>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert Tokenizer.load(model).eos_token_ids == (2, 9, 1)


def test_unknown_ids_decode_to_nothing(sentencepiece: tuple[Tokenizer, RustTokenizer]) -> None:
    assert sentencepiece[0].decode([260, -1, 267, 2**31, 2**40, 261]) == "ab"


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        DUMMY.encode("a\ud800")


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_is_what_transformers_makes_of_it(smollm2: tuple[Tokenizer, RustTokenizer], text: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(cached_path("smollm2-135m")))
    ids = smollm2[0].encode(text)
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert smollm2[0].decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert smollm2[0].decode(ids, skip_special_tokens=False) == text


def test_smollm2_splits_digits_and_knows_special_tokens(smollm2: tuple[Tokenizer, RustTokenizer]) -> None:
    tokenizer, _ = smollm2
    assert len(tokenizer.encode("31415")) == 5
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, 2]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == 49152


@given(text=TEXT)
def test_dummy_tokens_are_bytes(text: str) -> None:
    ids = DUMMY.encode(text)
    assert ids == list(text.encode())
    assert DUMMY.decode(ids) == text
    assert DUMMY.decode([token + 256 for token in ids]) == text


@given(text=TEXT)
@example(text=" a")
@example(text="  ab")
def test_sentencepiece_decodes_as_its_library_does(sentencepiece: Any, text: str) -> None:
    tokenizer, rust = sentencepiece
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == rust.decode(ids)
    assert tokenizer.decode(ids, False) == rust.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------- streams


@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 20) | st.integers(0, 300)), skip=st.booleans())
@settings(max_examples=300)
def test_any_tokens_stream_to_their_decoding_byte_level(smollm2: Any, ids: list[int], skip: bool) -> None:
    tokenizer, rust = smollm2
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)
    assert tokenizer.decode(ids, skip) == rust.decode(ids, skip_special_tokens=skip)


@given(data=st.binary())
@example(data=b"\xe2\xe2\x82\xac\xf0\x9f\x98")
@example(data=b"\xe0\x80\xed\xa0\x80\xf4\x90\xc0\xff")
def test_any_bytes_stream_to_their_decoding(data: bytes) -> None:
    assert "".join(stream(DUMMY, list(data))) == data.decode(errors="replace") == DUMMY.decode(data)


@given(ids=st.lists(st.integers(0, 270) | st.integers(259, 266)), skip=st.booleans())
def test_any_tokens_stream_to_their_decoding_sentencepiece(sentencepiece: Any, ids: list[int], skip: bool) -> None:
    tokenizer, rust = sentencepiece
    text = "".join(stream(tokenizer, ids, skip))
    assert text == tokenizer.decode(ids, skip)
    if "\ufffd" not in text:  # of invalid bytes the library makes one U+FFFD each, whatever is valid among them
        assert text == rust.decode(ids, skip_special_tokens=skip)


@given(text=TEXT)
@settings(max_examples=300)
@pytest.mark.parametrize("name", ["dummy", "smollm2"])
def test_text_comes_out_whole_and_as_soon_as_it_is_complete(name: str, smollm2: Any, text: str) -> None:
    tokenizer = DUMMY if name == "dummy" else smollm2[0]
    ids = tokenizer.encode(text)
    before = prefixes(tokenizer, ids)
    assume(b"".join(before[-1:]) == text.encode())  # SmolLM2's vocabulary lacks some bytes and drops them
    emitted = stream(tokenizer, ids, skip=False)
    assert "".join(emitted) == text
    for i, token_bytes in enumerate(before):
        assert "".join(emitted[: i + 1]) == complete(token_bytes)


def prefixes(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    pieces = [tokenizer.piece(token, skip_special_tokens=False) for token in ids]
    return [b"".join(pieces[: i + 1]) for i in range(len(pieces))]


def complete(data: bytes) -> str:
    """The characters of valid UTF-8 whose last byte is there."""
    for missing in range(4):
        try:
            return data[: len(data) - missing].decode()
        except UnicodeDecodeError:
            pass
    raise AssertionError(data)


# ---------------------------------------------------------------- chat templates

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "yo"}]


def test_dummy_chat() -> None:
    assert DUMMY.apply_chat_template(MESSAGES) == "user: Hi <b>\nassistant: yo\nassistant: "
    assert DUMMY.apply_chat_template(MESSAGES, add_generation_prompt=False) == "user: Hi <b>\nassistant: yo\n"


def test_smollm2_chat_is_what_transformers_makes_of_it(smollm2: tuple[Tokenizer, RustTokenizer]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(cached_path("smollm2-135m")))
    for generate in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generate)
        assert smollm2[0].apply_chat_template(MESSAGES, generate) == expected


def chat(directory: Path, template: Any, **tokens: Any) -> str:
    model = write(directory, sentencepiece_tokenizer(), chat_template=template, **tokens)
    return Tokenizer.load(model).apply_chat_template(MESSAGES)


def test_templates_as_hugging_face_reads_them(tmp_path: Path) -> None:
    blocks = "{% for m in messages %}\n  {% if loop.first %}\n{{ bos_token }}\n  {% endif %}\n{% endfor %}"
    assert chat(tmp_path, blocks, bos_token="<s>") == "<s>\n"
    assert chat(tmp_path, "{{ messages[0] | tojson }}") == '{"role": "user", "content": "Hi <b>"}'
    assert chat(tmp_path, "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}") == "user"
    assert re.fullmatch(r"\d{4}", chat(tmp_path, "{{ strftime_now('%Y') }}"))
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert chat(tmp_path, named) == "plain"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert chat(tmp_path, "from the config") == "from the file"


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "Expected"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% break %}", "outside loop"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_templates_that_fail_say_so_in_a_line(tmp_path: Path, template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        chat(tmp_path, template)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- broken files


def test_broken_tokenizer_files(tmp_path: Path) -> None:
    model = write(tmp_path, sentencepiece_tokenizer())
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())

    def fails(says: str, where: Path = path) -> None:
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            Tokenizer.load(model)
        assert str(where) in str(error.value) and "\n" not in str(error.value)

    path.write_text(json.dumps({**raw, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}))
    fails("decoder ['WordPiece'] is not supported")
    path.write_text(json.dumps({**raw, "model": {"type": "BPE", "vocab": 3}}))
    fails("no valid tokenizer")
    path.write_text("{")
    fails("not valid JSON")
    path.unlink()
    fails("is missing")
    path.write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text("{")
    fails("not valid JSON", tmp_path / "tokenizer_config.json")
