"""The dry run: it reads headers only, is right about what fits, and precedes every training run."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.commands import unigrpo
from unigrpo_cli.config import load_config
from unigrpo_cli.episode import Prompt
from unigrpo_cli.errors import TooLargeError
from unigrpo_cli.evaluate import NO_NOISE, train_sampling
from unigrpo_cli.models.mot.checkpoint import load_model
from unigrpo_cli.models.mot.config import (
    BAGEL,
    BAGEL_AUTOENCODER,
    BAGEL_NETWORK,
    Shapes,
    autoencoder_shapes,
    network_shapes,
)
from unigrpo_cli.rollout import rollout
from unigrpo_cli.run.console import Display
from unigrpo_cli.run.memory import config_of_rank, training_memory
from unigrpo_cli.run.memory.plan import Plan, changed, free_gib, plan_of, refuse_too_large, relief
from unigrpo_cli.run.memory.report import hours
from unigrpo_cli.run.setup import model_defaults

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = ("bagel_one_gpu", "bagel_unigrpo", "bagel_24gb")
REFUSAL = re.compile(r"'([^']+)' needs ([\d.]+) GiB, available are ([\d.]+); (.*), (?:together|which)")


def _sparse(path: Path, shapes: Shapes, dtype: str, width: int) -> None:
    """A weight file with a true header and a hole for a body."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = width * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release at full size, 30 GB of nothing."""
    directory = tmp_path_factory.mktemp("model") / "BAGEL-7B-MoT"
    directory.mkdir()
    c, v = BAGEL_NETWORK, BAGEL_NETWORK.vision
    assert v is not None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    llm = {name: getattr(c, name) for name in (*names, "vocab_size", "rms_norm_eps", "rope_theta")}
    vit = {"image_size": 980, "num_hidden_layers": v.num_hidden_layers + 1, "patch_size": v.patch_size}
    vit |= {name: getattr(v, name) for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    for name, content in (("llm_config.json", llm), ("vit_config.json", vit)):
        (directory / name).write_text(json.dumps(content))
    tiny = Path(__file__).parent / "golden" / "bagel_tiny" / "tokenizer.json"
    (directory / "tokenizer.json").write_bytes(tiny.read_bytes())
    _sparse(directory / "ema.safetensors", network_shapes(c), "BF16", 2)
    _sparse(directory / "ae.safetensors", autoencoder_shapes(BAGEL_AUTOENCODER), "F32", 4)
    return directory


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory, and an error for whoever reads a weight, opens a reward or makes a run."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("this must not be called")

    monkeypatch.setattr("unigrpo_cli.models.mot.weights.read_tensors", forbidden)
    monkeypatch.setattr("unigrpo_cli.models.mot.checkpoint.load_tokenizer", forbidden)
    monkeypatch.setattr("unigrpo_cli.run.prepare.load_policy", forbidden)
    monkeypatch.setattr("unigrpo_cli.run.start.open_rewards", forbidden)
    monkeypatch.setattr("unigrpo_cli.run.start.fresh_directory", forbidden)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _dry(model: Path | str, *settings: str) -> tuple[int, dict, str]:
    sets = [x for s in settings for x in ("--set", s)]
    result = unigrpo("train", "--model", model, "--dry-run", "--json", *sets)
    return result.exit_code, json.loads(result.stdout), result.stderr


LORA = (
    "train.finetune=lora",
    "train.activation_checkpointing=true",
    "train.micro_batch_size=1",
    "sampling.batch_size=16",
)


def test_it_accepts_and_refuses_at_the_boundary_and_reads_nothing(bagel: Path, unread: Path) -> None:
    code, plan, said = _dry(bagel, *LORA, "memory_gb=80")
    assert (code, plan["fits"]) == (0, True)
    assert "error" not in said
    need = plan["need_gib"]
    assert 30 < need < 80
    assert _dry(bagel, *LORA, f"memory_gb={need + 0.01}")[0] == 0
    code, plan, said = _dry(bagel, *LORA, f"memory_gb={need - 0.01}")
    assert (code, plan["fits"]) == (1, False)
    line = said.splitlines()[-1]
    assert line.startswith("error: BAGEL-7B-MoT does not fit") and repr(plan["peak"]) in line
    assert not list(unread.iterdir())


def test_its_sums_add_up(bagel: Path, unread: Path) -> None:
    _, plan, _ = _dry(bagel, *LORA, "memory_gb=80")
    always = sum(item["gib"] for item in plan["memory"]["always"])
    for phase in plan["memory"]["phases"]:
        assert phase["gib"] == pytest.approx(always + sum(item["gib"] for item in phase["items"]))
        assert all(item["formula"] for item in phase["items"])
    assert plan["need_gib"] == max(phase["gib"] for phase in plan["memory"]["phases"])
    weights = {item["item"]: item["gib"] for item in plan["memory"]["always"]}["frozen weights"]
    stored = (bagel / "ema.safetensors").stat().st_size / 2**30
    assert stored < weights < stored + 1.1, "as stored, and the head over the vocabulary in fp32"
    time = plan["time"]
    assert time["hours"] == pytest.approx(time["seconds_per_step"] * 1000 / 3600)
    assert time["rates"]["flops"] == 4e14
    assert plan["trained_parameters"] == 322_961_408


def test_training_refuses_by_the_same_sum_before_it_reads_or_writes(bagel: Path, unread: Path) -> None:
    sets = [x for s in (*LORA, "memory_gb=30", "device=cpu") for x in ("--set", s)]
    result = unigrpo("train", "--model", bagel, "--reward", "clip@model=x", "--out", unread / "run", *sets)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "does not fit" in line
    assert not list(unread.iterdir())


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_what_a_refusal_names_helps_as_much_as_it_says(bagel: Path, unread: Path, finetune: str) -> None:
    config = load_config(
        preset="paper",
        overrides=[f"train.finetune={finetune}", "dtype=bfloat16", "memory_gb=40", "sampling.batch_size=64"],
    )
    plan = plan_of(config, str(bagel), None, elsewhere=True)
    with pytest.raises(TooLargeError) as caught:
        refuse_too_large(plan)
    found = REFUSAL.search(str(caught.value))
    assert found, caught.value
    assert found[1] == plan.memory.peak.name
    assert float(found[2]) == pytest.approx(plan.memory.need, abs=0.06)
    named = re.findall(r"([\w.=\s]+?) saves ([\d.]+) GiB", found[4])
    assert 2 <= len(named) <= 3
    best = relief(plan)
    assert [saved for _, saved in best] == sorted((saved for _, saved in best), reverse=True)
    for (text, saved), (change, _) in zip(named, best, strict=False):
        again = training_memory(changed(plan.work, change))
        less = plan.memory.need - again.gib(again.phase(plan.memory.peak.name))
        assert float(saved) == pytest.approx(less, abs=0.06)
        assert text == text.lower(), "TOML's true"
        typed = load_config(preset="paper", overrides=text.split())
        for key in text.split():
            section, _, name = key.partition("=")[0].rpartition(".")
            both = (changed(plan.work, change).config, typed)
            own, other = ((c.model_dump()[section] if section else c.model_dump())[name] for c in both)
            assert own == other, "what it says can be typed"


def test_without_the_release_its_published_sizes_are_taken(bagel: Path, unread: Path) -> None:
    here = _dry(bagel, *LORA, "memory_gb=80")[1]
    code, elsewhere, _ = _dry(BAGEL, *LORA, "memory_gb=80")
    assert code == 0
    assert elsewhere["memory"] == here["memory"]
    other = unigrpo("train", "--model", "nobody/nothing", "--dry-run", "--set", "memory_gb=80")
    assert other.exit_code == 5


def test_a_size_that_cannot_be_painted_is_refused(bagel: Path, unread: Path) -> None:
    result = unigrpo("train", "--model", bagel, "--dry-run", "--set", "sampling.height=500", "--set", "memory_gb=80")
    assert result.exit_code == 2
    assert "multiples of 16" in result.stderr


def test_the_embedded_model_fits_anywhere_and_no_hours_are_invented_for_a_cpu(unread: Path) -> None:
    """By default, in its largest phase, it takes a gigabyte."""
    code, plan, _ = _dry("embedded", "device=cpu")
    assert code == 0
    assert plan["need_gib"] < 1.5
    assert plan["time"]["seconds_per_step"] is plan["time"]["hours"] is None
    shown = unigrpo("train", "--dry-run", "--set", "device=cpu").stdout
    assert "time: not estimated on a CPU; to plan for an accelerator of 80 GiB, add --set device=cuda" in shown
    assert " hours" not in shown


def test_the_hours_are_of_all_steps_and_marked_as_assumed(bagel: Path) -> None:
    found = {}
    for steps in (100, 1000):
        config = load_config(
            preset="paper", overrides=[*LORA, "dtype=bfloat16", "memory_gb=80", f"train.steps={steps}"]
        )
        line = hours(plan_of(config, str(bagel), None, elsewhere=True))
        assert "assumed, not measured: 400 TFLOP/s" in line
        found[steps] = float(re.search(rf"at least ([\d,.]+) hours for {steps} steps", line)[1].replace(",", ""))
    assert found[1000] == pytest.approx(10 * found[100], rel=0.02)


@pytest.mark.parametrize(("gib", "code", "says"), [(80, 0, "fits: "), (30, 1, "does not fit: ")])
def test_the_verdict_is_printed_when_quiet(bagel: Path, unread: Path, gib: int, code: int, says: str) -> None:
    sets = [x for s in (*LORA, f"memory_gb={gib}") for x in ("--set", s)]
    result = unigrpo("train", "--quiet", "--model", bagel, "--dry-run", *sets)
    assert result.exit_code == code
    assert result.stdout.startswith(says) and result.stdout.count("\n") == 1
    assert "no reward is chosen: training needs --reward" in result.stdout


def test_more_than_there_is_is_a_warning(tmp_path: Path, small_model: Path) -> None:
    small = ["--model", small_model, "--set", "doctor.at_start=off", "--set", "eval.steps=1", "--set", "eval.limit=1"]
    result = unigrpo("train", "--out", tmp_path / "r", "--steps", "0", "--set", "memory_gb=1000000", *small)
    assert result.exit_code == 0, result.output
    assert "memory_gb=1e+06, but there are only" in result.stderr


def test_pictures_that_come_with_prompts_take_room_in_the_plan(bagel: Path, unread: Path) -> None:
    """As the run finds its sizes: an edit is as large as its picture, and the context holds that picture."""
    Image.new("RGB", (16, 16)).save("a.png")
    Path("words.jsonl").write_text('{"prompt": "a red circle"}\n')
    Path("edits.jsonl").write_text('{"prompt": "make it red", "image": "a.png"}\n')
    more = ("train.finetune=lora", "dtype=bfloat16", "train.activation_checkpointing=true", "memory_gb=60")
    words, edits = (_dry(bagel, *more, f"prompts={name}.jsonl")[1]["sizes"] for name in ("words", "edits"))
    assert edits["sampling.batch_size"] < words["sampling.batch_size"]
    assert edits["train.micro_batch_size"] <= words["train.micro_batch_size"]


def test_a_run_is_planned_from_its_checkpoint(tmp_path: Path, small_model: Path) -> None:
    """Adapters as they are there; nothing is added to the run, and what cannot change is refused here, too."""
    small = ["--set", "train.prompts_per_step=2", "--set", "train.group_size=2", "--set", "eval.limit=1"]
    small += ["--set", "doctor.at_start=off", "--set", "eval.steps=1"]
    small += ["--model", small_model, "--set", "threads=1"]  # two would share out the batches
    lora = ["--set", "train.finetune=lora", "--set", "train.lora_rank=3"]
    run = tmp_path / "run"
    left_open = ["--set", "sampling.batch_size=0", "--set", "train.micro_batch_size=0"]
    begun = unigrpo("train", "--out", run, "--steps", "0", *lora, *small, *left_open, "--set", "memory_gb=2")
    assert begun.exit_code == 0
    assert "sampling.batch_size=4, train.micro_batch_size=4: chosen for 2.0 GiB of memory" in begun.stdout
    kept = load_config(file=run / "config.toml")
    assert (kept.sampling.batch_size, kept.train.micro_batch_size) == (4, 4), (
        "numbers are written down, not the question"
    )
    drawn = model_defaults({"model": str(run)})["sampling"]
    assert "rows" not in drawn and drawn["steps"] == kept.sampling.steps, "they were found for that machine"
    before = sorted(run.rglob("*"))
    more = ["--set", "train.prompts_per_step=200", *left_open]  # another question, but the run has its answer
    anew = json.loads(unigrpo("train", "--resume", run, "--dry-run", "--json", *more).stdout)
    assert (anew["sizes"], anew["batch"]["rollouts"], anew["batch"]["micro_batches"]) == ({}, 100, 100)
    assert unigrpo("train", "--resume", run, "--dry-run", "--set", "train.lora_rank=8").exit_code == 2
    result = unigrpo("train", "--resume", run, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    adapters = {i["item"]: i["formula"] for i in json.loads(result.stdout)["memory"]["always"]}["adapters"]
    assert "rank 3 " in adapters
    assert sorted(run.rglob("*")) == before


def test_lines_where_there_is_no_terminal_and_a_table_where_there_is_one(bagel: Path, unread: Path) -> None:
    result = unigrpo(
        "train", "--model", bagel, "--dry-run", "--set", "memory_gb=80", *[x for s in LORA for x in ("--set", s)]
    )
    assert result.exit_code == 0, result.output
    assert not set(result.stdout) & set("─│┃╭\x1b")
    (weights,) = [line for line in result.stdout.splitlines() if "frozen weights" in line]
    assert "14,607,260,128 x 2 bytes" in weights
    recorded = [line for line in result.stdout.splitlines() if "recorded steps" in line]
    assert recorded and all(line.endswith("the last; in fp32)") for line in recorded), (
        "no line is broken, whatever the width"
    )
    display = Display()
    display.console = Console(force_terminal=True, width=60, record=True, file=io.StringIO())
    display.table("sizes", ("a", "number"), [("first [b]", "1.00"), ("second", "22.00")], {1})
    text = display.console.export_text()
    assert "first [b]" in text and "22.00" in text


def test_what_is_left_open_is_found_and_said(bagel: Path, unread: Path) -> None:
    """In JSON and in one line; what is typed stays, and half the card, or pictures in the prompts, leave less."""
    left_open = ("train.finetune=lora", "dtype=bfloat16", "train.activation_checkpointing=true")
    found = {}
    for gib in (40, 80):
        _, plan, _ = _dry(bagel, *left_open, f"memory_gb={gib}")
        found[gib] = plan["sizes"]
        rows, micro = plan["sizes"]["sampling.batch_size"], plan["sizes"]["train.micro_batch_size"]
        assert (plan["batch"]["rollouts"], plan["batch"]["micro_batches"]) == (-(-768 // rows), -(-384 // micro))
    assert found[40]["sampling.batch_size"] < found[80]["sampling.batch_size"]
    assert plan["need_gib"] <= 0.9 * 80
    assert _dry(bagel, *left_open, "memory_gb=80", "sampling.batch_size=5")[1]["sizes"].keys() == {
        "train.micro_batch_size"
    }
    sets = [x for s in (*left_open, "memory_gb=80") for x in ("--set", s)]
    shown = unigrpo("train", "--model", bagel, "--dry-run", *sets).stdout
    assert f"sampling.batch_size={rows}, train.micro_batch_size={micro}: chosen for 80.0 GiB of memory" in shown
    config = load_config(preset="paper", overrides=[*left_open, "memory_gb=80"])
    edits = plan_of(config, str(bagel), None, elsewhere=True, pictures=True)
    assert edits.sizes["sampling.batch_size"] < rows


def test_ranks_that_cannot_share_the_prompts_are_refused(
    bagel: Path, unread: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    sets = [x for s in (*LORA, "memory_gb=80", "train.prompts_per_step=4") for x in ("--set", s)]
    result = unigrpo("train", "--model", bagel, "--dry-run", *sets)
    assert result.exit_code == 2
    assert "8 ranks x train.minibatches=2 must divide it" in " ".join(result.stderr.split())


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=12 * 2**30))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_gib(torch.device("cpu")) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_gib(torch.device("cpu")) == 3
    plan = plan_of(load_config(), "embedded", None)
    assert plan.available == plan.free == 3, "what must fit is compared with the same number that sizes are chosen for"


def test_cached_blocks_of_a_card_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB others use 30, this process holds 20, and torch caches 6 more."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (24 * 2**30, 80 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 26 * 2**30)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 20 * 2**30)
    assert free_gib(torch.device("cuda", 1)) == 30


def test_a_refusal_that_no_setting_helps_says_so(bagel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = ["sampling.batch_size=1", "sampling.think=false", "sampling.height=512", "sampling.width=512"]
    own = [*LORA[:3], *least, "sampling.vae_tile_rows=64", "dtype=bfloat16", "memory_gb=10"]
    own.append("model_options.quantize=nf4")
    plan = plan_of(load_config(preset="paper", overrides=own), str(bagel), None, elsewhere=True)
    with pytest.raises(TooLargeError, match="no setting saves memory there, so it takes a device with more memory"):
        refuse_too_large(plan)


def test_memory_that_does_not_suffice_names_the_smaller_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the allocator says; other errors are not touched, and nothing is tried again."""
    asked = []

    def too_much(*arguments: object) -> None:
        asked.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("unigrpo_cli.rollout._draw", too_much)
    config = load_config(overrides=["sampling.batch_size=6"])
    model = load_model("embedded")
    with pytest.raises(
        TooLargeError, match=r"a rollout with sampling\.batch_size=6: give sampling\.batch_size=3 \(CUDA out"
    ):
        rollout(model, [Prompt("a", "a red circle")], 12, train_sampling(config), NO_NOISE, 0)
    assert len(asked) == 1


# ----- recipes


def _recipe(name: str, gib: int = 80) -> Plan:
    config = load_config(file=EXAMPLES / name / "config.toml")
    assert config.memory_gb == gib
    return plan_of(config, config.model, None, elsewhere=True)


def test_the_recipe_for_one_card_leaves_room_on_it(bagel: Path) -> None:
    plan = _recipe("bagel_one_gpu")
    assert plan.fits
    assert plan.memory.need < 60
    assert plan_of(plan.work.config, str(bagel), None, elsewhere=True).memory == plan.memory
    page = (EXAMPLES / "bagel_one_gpu" / "README.md").read_text()
    for change, phase, says in (
        ({"sampling.batch_size": 64}, "sampling, image", "sampling takes {:.0f} GiB more"),
        ({"train.activation_checkpointing": False}, "update, logits", "the update takes {:.0f} GiB more"),
    ):
        other = training_memory(changed(plan.work, change))
        gib = [found.gib(found.phase(phase)) for found in (plan.memory, other)]
        assert says.format(gib[1] - gib[0]) in page


def test_a_base_of_4_bits_fits_a_card_of_24_gb_and_no_wider_one_does() -> None:
    plan = _recipe("bagel_24gb", 24)
    assert plan.memory.need < 20
    for kind in ("none", "int8"):
        wider = replace(plan, work=changed(plan.work, {"model_options": {"quantize": kind}}))
        wider = replace(wider, memory=training_memory(wider.work))
        with pytest.raises(TooLargeError, match="model_options.quantize=nf4 saves"):
            refuse_too_large(wider)


def test_the_papers_recipe_is_the_paper_and_refused_as_its_page_says() -> None:
    """Every value of the algorithm is the paper preset's; what its page promises of one process is so."""
    plan, paper = _recipe("bagel_unigrpo"), load_config(preset="paper")
    config = plan.work.config
    assert (config.objective, config.advantage, config.sampling) == (
        paper.objective,
        paper.advantage,
        paper.sampling.model_copy(update={"batch_size": 16}),
    )
    changes = {"micro_batch_size": 1, "activation_checkpointing": True, "reference_device": "host"}
    assert config.train == paper.train.model_copy(update=changes)
    with pytest.raises(TooLargeError, match=r"'optimizer step' needs 258\.1 GiB"):
        refuse_too_large(plan)
    page = (EXAMPLES / "bagel_unigrpo" / "README.md").read_text()
    for change, says in (
        ({"train.finetune": "lora"}, "`--set train.finetune=lora` needs {:.1f} GiB"),
        ({"train.experts": "image"}, "`--set train.experts=image` needs {:.1f} GiB"),
        ({"train.experts": "image", "sampling.height": 512, "sampling.width": 512}, "{:.1f} of them at 512 px"),
    ):
        assert says.format(training_memory(changed(plan.work, change)).need) in page
    on_device = changed(plan.work, {"train.reference_device": "device"})
    needs = [
        training_memory(replace(on_device, config=config_of_rank(on_device.config, world), world=world)).need
        for world in (8, 16)
    ]
    assert "Each of 8 ranks then needs {:.1f} GiB, of 16 ranks {:.1f}".format(*needs) in page


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_explain_every_value(name: str) -> None:
    for number, line in enumerate((EXAMPLES / name / "config.toml").read_text().splitlines(), 1):
        if "=" in line and not line.startswith("#"):
            assert re.search(r"  # \S+", line), f"{name}:{number}: {line}"


# ----- unigrpo inspect


def test_inspect_audits_the_full_size_by_its_headers(bagel: Path, unread: Path) -> None:
    """Parameters of each part, files, dtypes, memory: 30 GB that nobody reads, in no time and without torch."""
    done = unigrpo("inspect", bagel, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["kind"], facts["loadable"], facts["problems"]) == ("BAGEL", True, [])
    assert facts["tensors"] == 1223 + 244
    assert facts["dtypes"] == {"BF16": 1223, "F32": 244}
    sizes = {name: round(count / 1e9, 3) for name, count in facts["parameters"].items()}
    # 14.607 in all; the vision tower with its connector, and the image expert's 6.526 with 0.029 of its projections
    assert sum(sizes.values()) == pytest.approx(14.607 + 0.084, abs=2e-3)
    assert sizes["text expert"] == 7.616
    needed = facts["memory_gib"]
    assert 28 < needed["generate"] < needed["LoRA"] < 80 < needed["full fine-tuning"]
    shown = unigrpo("inspect", bagel).stdout
    assert "28 layers of width 3584" in shown
    assert "images up to 1024 px, can be shown pictures" in shown


def test_inspect_imports_no_torch(bagel: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['unigrpo', 'inspect', {str(bagel)!r}]\n"
        "from unigrpo_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inspect_names_every_problem(bagel: Path, tmp_path: Path) -> None:
    """All of them, where loading stops at the first; exit 5, and JSON says the same."""
    shapes = network_shapes(BAGEL_NETWORK)
    shapes.pop("llm2vae.bias")
    shapes["vae2llm.bias"] = (7,)
    shapes["extra"] = (1,)
    for name in ("llm_config.json", "vit_config.json"):
        (tmp_path / name).write_text((bagel / name).read_text())
    _sparse(tmp_path / "ema.safetensors", shapes, "BF16", 2)
    _sparse(tmp_path / "ae.safetensors", autoencoder_shapes(BAGEL_AUTOENCODER), "F32", 4)
    done = unigrpo("inspect", tmp_path)
    assert done.exit_code == 5
    for says in (
        "missing (e.g. llm2vae.bias)",
        "unexpected (e.g. extra)",
        "vae2llm.bias: file [7]",
        "no tokenizer",
    ):
        assert says in " ".join(done.stdout.split())
        assert says in " ".join(done.stderr.split())
    facts = json.loads(unigrpo("inspect", tmp_path, "--json").stdout)
    assert (facts["loadable"], len(facts["problems"])) == (False, 4)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", "config.json is damaged (not JSON"),
        ("llm_config.json", "", "llm_config.json is damaged (not JSON"),
        ("ema.safetensors", "short", "ema.safetensors: damaged or truncated"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "points to b.safetensors"),
    ],
)
def test_inspect_of_what_cannot_be_read_is_one_line(
    bagel: Path, tmp_path: Path, name: str, content: str, says: str
) -> None:
    for file in bagel.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / name).write_text(content)
    done = unigrpo("inspect", tmp_path)
    assert done.exit_code == 5
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert says in done.stderr


def test_a_run_is_refused_before_its_weights_are_read(bagel: Path, unread: Path) -> None:
    done = unigrpo("train", "--model", bagel, "--reward", "jpeg", "--set", "memory_gb=20")
    assert done.exit_code == 1
    assert "does not fit" in done.stderr
    assert not list(unread.iterdir())
