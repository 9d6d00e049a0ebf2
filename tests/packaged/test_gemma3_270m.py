"""The real Gemma 3 270M: a download of 240 MB, 0.8 GB of cache, 2 GB of memory."""

import json
import random
import urllib.request

import pytest
import torch

from hasten import packaged
from hasten.artifacts import Variant, read_json, write_json
from hasten.engine.base import Dtype, Request
from hasten.engine.gguf_layout import Entry
from hasten.engine.llamacpp import Llamacpp
from hasten.engine.llamacpp.conversion import Conversion, Converter
from hasten.model.config_json import from_huggingface
from hasten.model.huggingface import load_network
from hasten.tokenizer.base import load_tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
TEXTS = [
    PROMPT,
    "今天天气很好，我们去公园散步吧。 leading,  two   three    four\ttab\t\ttabs\n\n\nlines\r\n  indented\n\t\n",
    "🙂🎉👩‍👩‍👧‍👦🇨🇳 Zürich naïve café “quotes” … 1234567890",
    "a<table><tr>x</tr></table> <bos> <eos> <unused5> [multimodal]",
    "哈哈哈哈哈哈哈哈 hahahahaha aaaaaaaaaaaa ===========  ........",
    "\x01 \ufeff\u200b עברית العربية हिन्दी 한국어 日本語 𓀀",
    " " * 70 + "\n" * 70,
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    "",
]
MIXED = [*"猫\n\taA1。é🙂哈 ", "the ", "  ", "ing", "<b>", "==", "aa", "\r\n", "...."]


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """The checkpoint as a variant."""
    folder = tmp_path_factory.mktemp("gemma") / "v"
    folder.mkdir()
    for path in packaged.checkpoint("gemma3-270m").iterdir():
        if path.name != "manifest.json":
            (folder / path.name).symlink_to(path)
    manifest = {"schema": 1, "kind": "variant", "name": "gemma", "lineage": ["gemma"], "grid": None}
    write_json(folder / "manifest.json", manifest)
    return Variant(folder)


@pytest.fixture(scope="module")
def network(variant):
    return load_network(variant).eval()


@pytest.fixture(scope="module")
def stock():
    """The file as it was published, in llama.cpp."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(packaged.original("gemma3-270m"))
    parameters.n_ctx, parameters.verbosity, parameters.ui = 1024, 0, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(parameters)


def ask(server, path, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_its_shape_is_the_one_google_published(variant):
    config = from_huggingface(variant.config)
    assert (config.layers, config.hidden_size, config.heads, config.kv_heads, config.head_width) == (18, 640, 4, 1, 256)
    assert (config.feed_forward_size, config.vocab_size, config.context) == (2048, 262144, 32768)
    assert (config.sliding_window, config.rope_theta, config.local_rope_theta) == (512, 1e6, 1e4)
    assert [layer for layer in range(18) if not config.slides(layer)] == [5, 11, 17]
    assert config.tied_head
    assert config.norm_epsilon == 1e-6
    assert read_json(variant.path / "generation_config.json")["eos_token_id"] == 1
    assert "Gemma Terms of Use" in (variant.path / "NOTICE").read_text()
    assert (variant.path / "LICENSE-gemma.html").stat().st_size > 100_000


def test_it_tokenises_and_spells_as_llamacpp_does(variant, stock):
    from transformers import AutoTokenizer

    tokenizer, theirs = load_tokenizer(variant.path), AutoTokenizer.from_pretrained(variant.path)
    generator = random.Random(0)
    mixed = ["".join(generator.choices(MIXED, k=generator.randint(1, 40))) for _ in range(300)]
    for text in [*TEXTS, *mixed]:
        ids = tokenizer.encode(text)
        assert ask(stock, "/tokenize", {"content": text, "parse_special": False})["tokens"] == ids
        assert ask(stock, "/detokenize", {"tokens": ids})["content"] == text
        assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text
        if "<" not in text:
            assert theirs(text).input_ids == [tokenizer.bos_id, *ids]


def test_untuned_it_continues_a_sentence_sensibly_and_alike_in_both_engines(variant, network, tmp_path):
    tokenizer = load_tokenizer(variant.path)
    prompt = tokenizer.prompt_ids(PROMPT)
    state, ids, ours = network.new_state(1, 64, torch.float32), torch.tensor([prompt]), []
    with torch.inference_mode():
        for _ in range(24):
            ids = network(ids, state)[0, -1].argmax().view(1, 1)
            ours.append(int(ids))
    assert "capital of the country of France" in tokenizer.decode(ours)
    engine = Llamacpp(threads=1, weight_dtype=Dtype.bfloat16, kv_cache_dtype=Dtype.float32, max_context=64)
    session = engine.load(variant, tmp_path)
    assert [token.id for token in session.submit(Request(0, prompt, 24))] == ours
    session.close()


def test_dequantised_it_says_what_the_published_file_says(variant, network, stock):
    """Beyond the sliding window too. llama.cpp rounds activations to 8 bits, we round weights to bfloat16."""
    text = "".join(f"{number} bottles of beer on the wall, 今天天气很好。 " for number in range(60))
    prompt = load_tokenizer(variant.path).prompt_ids(text)[:700]
    body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, "top_k": 1, "logprobs": 8}
    found = stock.handle_completions(body)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    with torch.inference_mode():
        ours = network(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    assert found[0]["id"] == int(ours.argmax())
    likely = [one for one in found if one["logprob"] > -6]
    assert all(one["logprob"] == pytest.approx(float(ours[one["id"]]), abs=0.4) for one in likely)


def test_the_published_file_has_the_types_that_our_recipe_gives_its_tensors():
    from gguf import GGUFReader

    tensors = GGUFReader(packaged.original("gemma3-270m")).tensors
    recipe = Converter({}, None, Dtype.float16, Conversion.Q4_K_M, layers=18, tied=True)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in tensors}
    entries = {name: Entry("", name.rpartition(".")[0], shape) for name, shape in shapes.items()}
    found = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert found == {name: recipe.kind(entry) for name, entry in entries.items()}
    assert set(found.values()) == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
