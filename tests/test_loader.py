"""The loader against configurations and weights that transformers writes, and against every way to break them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidisagg.core.plan import PlanItem
from minidisagg.model.config import ModelConfig, RopeConfig
from minidisagg.model.dummy import SHAPES, parameter_shapes
from minidisagg.model.loader import cache_dir, cached_path, identity, load_config, load_weights, resolve

torch.set_num_threads(1)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_config(directory: Path, **changes: Any) -> str:
    raw = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(raw))
    return str(directory)


def write_model(directory: Path, **changes: Any) -> tuple[str, ModelConfig]:
    """A model directory with one safetensors file of random weights."""
    model = write_config(directory, **changes)
    config = load_config(model)
    shapes = parameter_shapes(config)
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, directory / "model.safetensors")
    return model, config


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_pages_are_of_these_weights_and_of_no_others(tmp_path: Path) -> None:
    """A store's pages outlive the engine, and a directory's name says nothing of what is in it."""
    (tmp_path / "a").mkdir()
    model, _ = write_model(tmp_path / "a")
    same = shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert identity(model) == identity(str(same))
    weights = load_file(same / "model.safetensors")
    for name in weights:
        other = shutil.copytree(tmp_path / "a", tmp_path / name)
        save_file(weights | {name: weights[name] * 1.01}, other / "model.safetensors")
        assert identity(str(other)) != identity(model), name
    theta = shutil.copytree(tmp_path / "a", tmp_path / "theta")
    config = json.loads((theta / "config.json").read_text())
    (theta / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert identity(str(theta)) != identity(model)


# ---------------------------------------------------------------- where


def test_cache_directory_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MINIDISAGG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "minidisagg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "minidisagg"
    monkeypatch.setenv("MINIDISAGG_CACHE", str(tmp_path / "own"))
    assert cached_path("a/b") == tmp_path / "own" / "models" / "a" / "b"


def test_resolve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINIDISAGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="minidisagg pull smollm2-135m") as error:
        resolve("smollm2-135m")
    one_line(error)
    for unknown in ("no-such-model", "", "./nowhere", "/nowhere/at/all"):
        with pytest.raises(ValueError, match="directory") as error:
            resolve(unknown)
        assert repr(unknown) in one_line(error)
    (tmp_path / "local").mkdir()
    assert resolve("local") == Path("local")
    pulled = cached_path("smollm2-135m")
    pulled.mkdir(parents=True)
    write_config(pulled)
    assert resolve("smollm2-135m") == pulled
    assert load_config("smollm2-135m").name == "smollm2-135m"


def test_load_config_does_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from minidisagg.model.loader import load_config;"
        f"load_config({write_config(tmp_path)!r}); load_config('dummy:tiny'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], env={**os.environ}).returncode == 0


# ---------------------------------------------------------------- configuration


def test_config_fields(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, rope_theta=5e5, tie_word_embeddings=True, head_dim=8))
    assert config == ModelConfig(
        name=str(tmp_path),
        architecture="LlamaForCausalLM",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_model_len=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=5e5),
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}},
    ],
)
def test_llama3_rope_in_each_spelling(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert load_config(write_config(tmp_path, **changes)).rope == RopeConfig(5e5, 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "changes, theta",
    [
        ({}, 1e4),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
    ],
)
def test_plain_rope_in_each_spelling(tmp_path: Path, changes: dict[str, Any], theta: float) -> None:
    assert load_config(write_config(tmp_path, **changes)).rope == RopeConfig(theta=theta)


def test_dtype_in_both_spellings(tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path, torch_dtype="float16")).dtype == "float16"
    assert load_config(write_config(tmp_path, torch_dtype="absent", dtype="float32")).dtype == "float32"


@pytest.mark.parametrize(
    "config_eos, generation_eos, expected",
    [(2, None, (2,)), ([5, 6], None, (5, 6)), (2, 3, (2, 3)), (2, [3, 2, 4], (2, 3, 4)), ("absent", [7], (7,))],
)
def test_eos_ids_from_both_files(tmp_path: Path, config_eos: Any, generation_eos: Any, expected: tuple[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert load_config(write_config(tmp_path, eos_token_id=config_eos)).eos_token_ids == expected


def test_family_flags(tmp_path: Path) -> None:
    flags = {}
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        config = load_config(write_config(tmp_path, architectures=[architecture], sliding_window=None))
        flags[architecture[:5]] = (config.qkv_bias, config.qk_norm)
    assert flags == {"Llama": (False, False), "Mistr": (False, False), "Qwen2": (True, False), "Qwen3": (False, True)}
    assert load_config(write_config(tmp_path, architectures="absent", model_type="qwen3")).qk_norm


ALTERNATING = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "architecture, changes, layers",
    [
        ("Mistral", {"sliding_window": 128}, ()),  # no context is longer
        ("Mistral", {"sliding_window": None}, ()),
        ("Mistral", {"sliding_window": 64}, (0, 1)),
        ("Mistral", {"max_position_embeddings": 8192}, (0, 1)),  # the default is 4096
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 64}, ()),
        ("Qwen2", {"sliding_window": 64}, ()),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, ()),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64}, ()),  # 28 layers have none
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, (1,)),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ALTERNATING}, (1,)),
        ("Llama", {"sliding_window": 128, "layer_types": ["full_attention"] * 2}, ()),
    ],
)
def test_which_layers_have_a_window(
    tmp_path: Path, architecture: str, changes: dict[str, Any], layers: tuple[int, ...]
) -> None:
    config = load_config(write_config(tmp_path, architectures=[f"{architecture}ForCausalLM"], **changes))
    assert config.windowed_layers == layers
    assert config.sliding_window == (changes.get("sliding_window", 4096) if layers else 0)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"architectures": "absent", "model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"architectures": "absent"}, "key 'model_type' is missing"),
        ({"model_type": "qwen2"}, "architectures says LlamaForCausalLM, but model_type 'qwen2'"),
        ({"sliding_window": 64}, "sliding_window 64 is not supported with LlamaForCausalLM"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "key 'low_freq_factor' is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, not 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, not None"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        load_config(write_config(tmp_path, **changes))
    assert str(tmp_path / "config.json") in one_line(error)


@pytest.mark.parametrize(
    "content, says", [("{", "not valid JSON"), ("[1]", "JSON object"), (b"\xff", "not valid JSON")]
)
def test_broken_config_file(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error:
        load_config(str(tmp_path))
    assert str(tmp_path / "config.json") in one_line(error)


# ---------------------------------------------------------------- weights


def shard(directory: Path) -> tuple[Path, Path]:
    """Cut the directory's one file in two, with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    paths = (directory / "model-00001-of-00002.safetensors", directory / "model-00002-of-00002.safetensors")
    halves: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for i, name in enumerate(sorted(weights)):
        halves[i % 2][name] = weights[name]
    weight_map: dict[str, str] = {}
    for path, half in zip(paths, halves, strict=True):
        save_file(half, path)
        weight_map |= {name: path.name for name in half}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def test_single_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    model, config = write_model(tmp_path)
    single = {name: tensor.clone() for name, tensor in load_weights(model, config).items()}
    assert {name: tuple(tensor.shape) for name, tensor in single.items()} == parameter_shapes(config)
    shard(tmp_path)
    sharded = load_weights(model, config)
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_tied_head_and_inv_freq_are_left_out(tmp_path: Path) -> None:
    model, config = write_model(tmp_path, tie_word_embeddings=True)
    tied = load_file(tmp_path / "model.safetensors")
    embeddings = tied["model.embed_tokens.weight"]

    def loaded(**more: torch.Tensor) -> dict[str, torch.Tensor]:
        save_file({**tied, **more}, tmp_path / "model.safetensors")
        return load_weights(model, config)

    assert loaded(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}).keys() == tied.keys()
    assert loaded(**{"lm_head.weight": embeddings.clone()}).keys() == tied.keys()
    assert torch.equal(loaded(**{"lm_head.weight": -embeddings})["lm_head.weight"], -embeddings)
    del tied["model.embed_tokens.weight"]
    alone = loaded(**{"lm_head.weight": embeddings})
    assert torch.equal(alone["model.embed_tokens.weight"], embeddings) and "lm_head.weight" not in alone


def test_broken_weight_files(tmp_path: Path) -> None:
    model, config = write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, good = path.read_bytes(), load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def fails(says: str) -> None:
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            load_weights(model, config)
        assert str(tmp_path) in one_line(error)

    for size in (len(whole) - 1, len(whole) // 2, 20, 0):
        path.write_bytes(whole[:size])
        fails(f"{path} is truncated or corrupt")
    path.write_bytes(b"\xff" * 8 + whole[8:])
    fails(f"{path} is truncated or corrupt")
    save_file({key: value for key, value in good.items() if key != name}, path)
    fails(f"weight {name} is missing")
    save_file({**good, name: good[name][:-1].clone()}, path)
    fails(f"{name} is (23, 16), but config.json makes it (24, 16)")
    save_file({**good, name: good[name].to(torch.int8)}, path)
    fails(f"{name} has dtype I8")
    save_file({**good, "model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, path)
    fails("unexpected weight model.layers.0.self_attn.q_proj.bias")
    path.unlink()
    fails("only safetensors weights can be loaded")


def test_broken_shards(tmp_path: Path) -> None:
    model, config = write_model(tmp_path)
    _, second = shard(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match="download the shard") as error:
        load_weights(model, config)
    assert str(second) in one_line(error)
    for index in ("{", "{}", '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json") as error:
            load_weights(model, config)
        one_line(error)


# ---------------------------------------------------------------- dummy models


def test_dummy_options() -> None:
    config = load_config("dummy:tiny,layers=4,hidden=32,vocab=300,tied=1,max_len=4096,dtype=bfloat16,seed=3,std=0.1")
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.max_model_len) == (4, 32, 300, 4096)
    assert config.tie_embeddings and config.dtype == "bfloat16" and config.eos_token_ids == ()
    assert config.name.startswith("dummy:tiny,")
    weights = load_weights(config.name, config)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == parameter_shapes(config)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["model.embed_tokens.weight"].float().std().item() == pytest.approx(0.1, rel=0.05)
    tiny = load_config("dummy:tiny")
    assert (tiny.num_layers, tiny.hidden_size, tiny.num_heads, tiny.num_kv_heads) == (2, 64, 4, 2)
    assert (tiny.head_dim, tiny.vocab_size, tiny.tie_embeddings) == (16, 512, False)
    parameters = {shape: round(config.num_parameters / 1e6) for shape, config in SHAPES.items()}
    assert parameters == {"tiny": 0, "smollm2-135m": 134, "qwen3-0.6b": 596, "llama-8b": 7505}


@pytest.mark.parametrize(
    "model, says",
    [
        ("dummy:huge", "shapes are tiny, smollm2-135m, qwen3-0.6b, llama-8b"),
        ("dummy:", "shapes are"),
        ("dummy:tiny,depth=3", "options are layers, hidden"),
        ("dummy:tiny,layers=0", "'0' is no value for layers"),
        ("dummy:tiny,layers", "'' is no value for layers"),
        ("dummy:tiny,tied=2", "'2' is no value for tied"),
        ("dummy:tiny,dtype=int8", "'int8' is no value for dtype"),
        ("dummy:tiny,std=nan", "'nan' is no value for std"),
        ("dummy:tiny,vocab=100", "at least 256"),
        ("dummy:tiny,kv_heads=3", "multiple of kv_heads"),
    ],
)
def test_bad_dummy_names(model: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        load_config(model)
    assert one_line(error).startswith(model)


def test_dummy_weights_are_the_same_in_every_process() -> None:
    program = (
        "import hashlib, torch; torch.manual_seed(7); torch.set_num_threads(2)\n"
        "from minidisagg.model.loader import load_config, load_weights\n"
        "weights = load_weights('dummy:tiny', load_config('dummy:tiny'))\n"
        "print(hashlib.sha256(b''.join(w.numpy().tobytes() for w in weights.values())).hexdigest())"
    )

    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    config = load_config("dummy:tiny")
    state = torch.random.get_rng_state()
    here = load_weights("dummy:tiny", config)
    assert torch.equal(state, torch.random.get_rng_state())
    assert elsewhere.strip() == hashlib.sha256(b"".join(w.numpy().tobytes() for w in here.values())).hexdigest()
    other = load_weights("dummy:tiny,seed=1", config)
    assert not any(torch.equal(other[name], here[name]) for name in here if not name.endswith("norm.weight"))


# ---------------------------------------------------------------- with the transformer, against transformers


class Cache:
    """The least that `PagedKV` asks for."""

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        self.num_pages, self.page_size, self.num_kv_heads = num_pages, page_size, config.num_kv_heads
        shape = (2, num_pages, config.num_kv_heads, page_size, config.head_dim)
        layers = [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
        self.token_rows = [layer.view(-1, config.head_dim) for layer in layers]
        self.page_rows = [layer.view(-1, page_size * config.head_dim) for layer in layers]


class Engine:
    """Our transformer on one sequence."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        from minidisagg.model.transformer import Transformer

        self.config, self.dtype = load_config(model), dtype
        self.transformer = Transformer(self.config, load_weights(model, self.config), dtype, torch.device("cpu"))

    def logits(self, cache: Cache, start: int, tokens: list[int]) -> torch.Tensor:
        """Logits [vocab_size] after `tokens` at positions from `start` on."""
        from minidisagg.model.attention import build_batch

        pages = list(range(cache.num_pages))
        item = PlanItem("r", 0, start, len(tokens), tokens, pages, sample=True, index=0)
        batch = build_batch([item], [tokens], cache, self.dtype, torch.device("cpu"))
        return self.transformer.logits(self.transformer.hidden(batch, cache)[batch.sample_rows_S])[0]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        cache = Cache(self.config, 8, 16, self.dtype)
        output: list[int] = []
        new = prompt
        for _ in range(count):
            start = len(prompt) + len(output) - len(new)
            new = [int(self.logits(cache, start, new).argmax())]
            output += new
        return output


@pytest.mark.parametrize(
    "model",
    [
        "dummy:tiny",
        "dummy:tiny,std=0.1",
        "dummy:tiny,std=0.2",
        "dummy:tiny,std=1",
        "dummy:tiny,std=0.1,layers=4",
        "dummy:tiny,std=0.1,layers=1",
        "dummy:qwen3-0.6b,tied=0,layers=2,hidden=64,vocab=512,intermediate=128,std=0.1,dtype=float32",
        "dummy:smollm2-135m,tied=0,layers=2,hidden=96,vocab=512,intermediate=128,std=0.1",
    ],
)
def test_an_untied_dummy_model_does_not_repeat_itself(model: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for seed in range(3):
        engine = Engine(f"{model},seed={seed}", torch.float32)
        for length in (3, 12, 40):
            prompt = torch.randint(0, 512, (length,), generator=generator).tolist()
            assert len(set(engine.greedy(prompt, 32))) >= 16


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3_SCALING}, "head_dim": 16},
    "Mistral": {"sliding_window": None, "head_dim": 16},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read_and_computes_the_same(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            **shape, **FAMILIES[family], initializer_range=0.2, eos_token_id=[3, 4]
        )
    ).eval()
    for name, parameter in theirs.named_parameters():  # norms and biases start as ones and zeros, which hides mistakes
        if name.endswith(("norm.weight", ".bias")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    engine = Engine(str(tmp_path), torch.float32)
    assert engine.config.eos_token_ids == (3, 4)
    tokens = torch.randint(0, 96, (50,)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0, -1]
    actual = engine.logits(Cache(engine.config, 4, 16, torch.float32), 0, tokens)
    assert (actual - expected).norm() / expected.norm() < 1e-4


TEXT = """A hash table is a data structure that implements an associative array, also called a dictionary; it maps keys
to values. In 1248 the cathedral of Cologne was begun; it was not complete until 1880. def f(x): return x ** 2"""


def test_smollm2_logits_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    if not (cached_path("smollm2-135m") / "config.json").is_file():
        pytest.skip("smollm2-135m is not in the cache; run: minidisagg pull smollm2-135m")
    path = str(cached_path("smollm2-135m"))
    tokens: list[int] = transformers.AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    engine = Engine(path, torch.float32)
    cache = Cache(engine.config, 8, 16, torch.float32)
    prefix = len(tokens) - 8
    actual = [engine.logits(cache, 0, tokens[:prefix])]
    actual += [engine.logits(cache, prefix + i, [token]) for i, token in enumerate(tokens[prefix:])]
    error = (torch.stack(actual) - expected[prefix - 1 :]).norm() / expected[prefix - 1 :].norm()
    assert error < 1e-4
