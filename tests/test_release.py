"""Model directories that are whole, odd, or broken: a broken one gets one clear line before anything is loaded."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from unigrpo_cli.config import load_config
from unigrpo_cli.errors import WeightsError
from unigrpo_cli.models.files import read_header
from unigrpo_cli.models.hub import locate
from unigrpo_cli.models.lora import load_adapters
from unigrpo_cli.models.mot.bagel import HUB_FILES, read_release, tokenizer_problems
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.config import BAGEL
from unigrpo_cli.run.memory.plan import plan_of
from unigrpo_cli.run.setup import find_checkpoint, model_defaults, model_of

TINY = Path(__file__).parent / "golden" / "bagel_tiny"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the tiny release, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("golden.*")))


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text) and None


def _without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:keep]) and None


def _weights(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        state = load_file(model / file)
        change(state)
        save_file(state, model / file)

    return damage


def _set(name: str, key: str, value: object) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = json.loads((model / name).read_text())
        content[key] = value
        (model / name).write_text(json.dumps(content))

    return damage


LAYER = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"
BROKEN = {
    "truncated weights": (_cut("ema.safetensors", 300_000), "ema.safetensors: damaged or truncated"),
    "truncated header": (_cut("ema.safetensors", 900), "ema.safetensors: damaged or truncated"),
    "empty weights": (_cut("ema.safetensors", 0), "damaged or truncated"),
    "weights are a page of text": (_text("ema.safetensors", "<html>404</html>" * 9), "damaged or truncated"),
    "truncated autoencoder": (_cut("ae.safetensors", 1_000_000), "ae.safetensors: damaged or truncated"),
    "missing tensor": (_weights("ema.safetensors", lambda s: s.pop(LAYER)), f"1 tensor missing (e.g. {LAYER})"),
    "missing tensor of the tower": (
        _weights("ema.safetensors", lambda s: s.pop("vit_model.vision_model.post_layernorm.bias")),
        "1 tensor missing (e.g. vit_model.vision_model.post_layernorm.bias)",
    ),
    "missing tensor of the autoencoder": (
        _weights("ae.safetensors", lambda s: s.pop("decoder.conv_out.bias")),
        "ae.safetensors: 1 tensor missing (e.g. decoder.conv_out.bias)",
    ),
    "unexpected tensor": (
        _weights("ema.safetensors", lambda s: s.update(extra=s[LAYER].clone())),
        "1 tensor unexpected (e.g. extra)",
    ),
    "wrong shape": (
        _weights("ema.safetensors", lambda s: s.update({LAYER: s[LAYER][:3].clone()})),
        f"(e.g. {LAYER}: file [3, 64], configuration [160, 64])",
    ),
    "whole numbers": (
        _weights("ema.safetensors", lambda s: s.update({LAYER: s[LAYER].int()})),
        f"1 tensor not of floating-point numbers (e.g. {LAYER}: I32)",
    ),
    "invalid config.json": (_text("config.json", '{"latent_patch_size": 2'), "config.json is damaged (not JSON"),
    "config.json of another kind": (_text("config.json", "[1]"), "config.json is damaged (a JSON object is needed"),
    "no llm_config.json": (_without("llm_config.json"), "llm_config.json is missing"),
    "empty llm_config.json": (
        _text("llm_config.json", "{}"),
        "unreadable configuration (rope_parameters is missing)",
    ),
    "odd sizes": (_set("llm_config.json", "num_hidden_layers", "two"), "num_hidden_layers = 'two'"),
    "another activation": (_set("llm_config.json", "hidden_act", "relu"), "hidden_act = 'relu'"),
    "fewer layers": (_set("llm_config.json", "num_hidden_layers", 1), "28 tensors unexpected"),
    "wider feed-forward": (_set("llm_config.json", "intermediate_size", 176), "of another shape"),
    "no vit_config.json": (_without("vit_config.json"), "vit_config.json is missing"),
    "another tower": (_set("vit_config.json", "num_hidden_layers", 4), "tensors missing (e.g. vit_model"),
    "no tokenizer": (
        lambda m: [(m / n).unlink() for n in ("tokenizer.json", "vocab.json")] and None,
        "no tokenizer: tokenizer.json is missing",
    ),
    "index that points nowhere": (
        _text("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "points to model-00001-of-00002.safetensors, which is not there",
    ),
    "index that points outside": (
        _text("model.safetensors.index.json", '{"weight_map": {"a": "../../etc/passwd"}}'),
        "points outside its directory",
    ),
    "index without a map": (_text("model.safetensors.index.json", "{}"), "weight_map is missing"),
    "no weights": (
        lambda m: [(m / n).unlink() for n in ("ema.safetensors", "model.safetensors.index.json")] and None,
        "ema.safetensors is missing",
    ),
    "no autoencoder": (_without("ae.safetensors"), "ae.safetensors is missing"),
    "a factor that is not the autoencoder's": (
        _set("config.json", "vae_config", {"z_channels": 16, "downsample": 16}),
        "config.json says a latent stands for 16 pixels",
    ),
    "a table where a row should be": (
        _weights("ema.safetensors", lambda s: s.update({"vae2llm.weight": s["vae2llm.bias"][0].clone()})),
        "a tensor has fewer axes than it must",
    ),
    "vae_config is null": (_set("config.json", "vae_config", None), "config.json: vae_config = None: an object is"),
    "a system prompt that is no text": (_set("config.json", "system_prompt", 3), "system_prompt = 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_release_gets_one_clear_line(copy: Path, name: str) -> None:
    damage, says = BROKEN[name]
    damage(copy)
    with pytest.raises(WeightsError) as caught:
        load_model(str(copy))
    line = str(caught.value)
    assert says in line
    assert "\n" not in line
    assert str(copy) in line


def test_a_damaged_tokenizer_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer\.json: unreadable tokenizer"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("shape", "offsets", "size"),
    [([8], [16, 32], 32), ([4], [0, 16], 16), ([4], [-8, 8], 16), ([4], [24, 40], 40), ([4], [16, 32], 33)],
)
def test_bytes_that_no_tensor_or_two_tensors_hold(
    tmp_path: Path, shape: list[int], offsets: list[int], size: int
) -> None:
    """Bytes that do not fit a shape, lie over other tensors or belong to none are not weights."""
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    header["b"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(WeightsError, match="damaged or truncated"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: "{", "tokenizer.json is unreadable"),
        (lambda t: t.replace("<|vision_start|>", "<|other|>"), "tokenizer.json lacks <|vision_start|>"),
    ],
)
def test_inspect_looks_into_the_tokenizer(copy: Path, change: Callable[[str], str], says: str) -> None:
    assert tokenizer_problems(read_release(copy)) == []
    path = copy / "tokenizer.json"
    path.write_text(change(path.read_text()))
    (found,) = tokenizer_problems(read_release(copy))
    assert says in found


def test_inspect_sees_ids_beyond_the_vocabulary(copy: Path) -> None:
    release = read_release(copy)
    (found,) = tokenizer_problems(replace(release, config=replace(release.config, vocab_size=397)))
    assert "ids up to 397, the network's vocabulary 397 words" in found
    assert tokenizer_problems(replace(release, config=replace(release.config, vocab_size=398))) == []


@pytest.mark.parametrize("text", ['{"model_type": "bagel",}', '{\n  "_name_or_path": "BAGEL-7B-MoT",\n}\n'])
def test_the_comma_of_early_snapshots_is_forgiven(copy: Path, text: str) -> None:
    """All that `config.json` says of a BAGEL is in its tensors; nothing else is forgiven."""
    whole = read_release(copy)
    (copy / "config.json").write_text(text)
    odd = read_release(copy)
    assert odd.problems == ()
    assert "superfluous comma" in odd.notes[0]
    assert odd.config == whole.config
    (copy / "config.json").unlink()
    assert read_release(copy).config == whole.config


def test_sides_and_widths_come_from_the_tensors(copy: Path) -> None:
    """`config.json` may name another table: the official code's own default is wrong for its release."""
    whole = read_release(copy)
    _set("config.json", "max_latent_size", 32)(copy)
    assert read_release(copy).config.max_latent_size == whole.config.max_latent_size == 16
    assert whole.config.vision.side == 8
    assert whole.autoencoder.widths == (32, 64, 32, 32)


def test_weights_in_several_files(copy: Path) -> None:
    """An index over shards, as tools write it when they save a release again."""
    state = load_file(copy / "ema.safetensors")
    names = sorted(state)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({n: state[n] for n in own}, copy / file)
    (copy / "ema.safetensors").unlink()
    table = {n: file for file, own in files.items() for n in own} | {"decoder.conv_in.bias": "ae.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    one, many = load_model(str(TINY)).network.state_dict(), load_model(str(copy)).network.state_dict()
    assert all(one[n].equal(many[n]) for n in one)


def _cached(root: Path, snapshot: str = "0123abcd", name: str = "someone/tiny") -> Path:
    """The tiny release as huggingface_hub's cache keeps a model: names that link to blobs without one."""
    repo = root / f"models--{name.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{snapshot}"):
        (repo / folder).mkdir(parents=True)
    for k, file in enumerate(p for p in TINY.iterdir() if not p.name.startswith("golden.")):
        shutil.copyfile(file, repo / "blobs" / f"{k:040x}")
        (repo / "snapshots" / snapshot / file.name).symlink_to(repo / "blobs" / f"{k:040x}")
    (repo / "refs" / "main").write_text(snapshot)
    return repo / "snapshots" / snapshot


def test_a_model_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, from the cache; what is not there gets one line with the command that fetches it."""
    _cached(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    directory, file = locate("someone/tiny", HUB_FILES)
    assert directory.parent.parent.name == "models--someone--tiny"
    assert file is None
    assert load_model("someone/tiny").release.kind == "BAGEL"
    with pytest.raises(WeightsError, match="hf download someone/else"):
        locate("someone/else", HUB_FILES)
    with pytest.raises(WeightsError, match="no model at"):
        locate("no such model", HUB_FILES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_weights_file_of_a_model_by_its_hub_id(cache: Path) -> None:
    """A link in the cache is followed to its bytes and keeps its name; its defaults are a BAGEL's own."""
    snapshot = _cached(cache, name="someone/grown")
    (snapshot / "ema.safetensors").rename(snapshot / "grown.safetensors")
    (snapshot / "model.safetensors.index.json").unlink()
    config = load_config(
        named={"model": "someone/grown", "weights_file": "grown.safetensors"}, model_defaults=model_defaults
    )
    assert (config.preset, config.dtype, config.sampling.height) == ("paper", "bfloat16", 256)
    base, adapter = find_checkpoint(model_of(config))
    assert Path(base).name == "grown.safetensors"
    assert adapter is None
    assert load_model(base).release.kind == "BAGEL"


def test_a_model_of_the_hub_has_the_same_defaults_before_and_after_it_is_fetched(cache: Path) -> None:
    before = model_defaults({"model": "someone/tiny"})
    _cached(cache)
    after = model_defaults({"model": "someone/tiny"})
    for name in ("preset", "dtype"):
        assert before[name] == after[name]
    assert model_defaults({}) == model_defaults({"model": "embedded"}) == {}


def test_a_broken_model_in_the_cache_is_not_taken_for_one_that_is_not_there(cache: Path) -> None:
    config = load_config(overrides=["memory_gb=80", "train.finetune=lora", "dtype=bfloat16"])
    assert plan_of(config, BAGEL, None, elsewhere=True).published
    weights = _cached(cache, name=BAGEL) / "ema.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:300_000])
    with pytest.raises(WeightsError, match="truncated"):
        plan_of(config, BAGEL, None, elsewhere=True)


def test_other_kinds_of_adapters_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(WeightsError, match="an adapter of kind IA3; this version takes LoRA"):
        load_adapters(load_model(str(TINY)).network, tmp_path)
